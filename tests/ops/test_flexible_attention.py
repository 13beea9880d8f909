"""Flex attention without its compiler, which needs a GPU: the same formulas and masks, against tiles in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.ops import attention, flexible_attention
from lora_cli.ops.blocked_attention import attend_in_blocks
from lora_cli.ops.flexible_attention import BLOCK, attend_flexibly, block_mask, can_attend_flexibly, reasons_against
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import Sight

LENGTHS = [5, 150, 1, 300, 33, 129, 40]  # rows within a block, across several, and ending with one
HEADS, KV_HEADS, SIZE = 6, 2, 16
SIGHTS = [
    Sight(0.3, causal, window, softcap)
    for causal, window, softcap in itertools.product((True, False), (None, 3, 140), (None, 5.0))
]
ROWS = {
    "whole rows": Rows.of(LENGTHS),
    "behind a prefix": Rows.of([130, *LENGTHS], prefix=130),
    "parts of rows": Rows.of(LENGTHS).part([2, 100, 0, 0, 32, 1, 7], [3, 50, 1, 299, 1, 128, 20]),
    "one row": Rows.of([7]),
}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain formula of torch's, which it gives a backward pass on a GPU alone."""
    place = "torch.nn.attention.flex_attention"
    monkeypatch.setattr(f"{place}._validate_device", lambda *tensors: None)
    monkeypatch.setattr(f"{place}._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flexible_attention, "kernel", lambda formula, kernels: formula)
    flexible_attention._why_not.cache_clear()


def draw(rows: Rows, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values, and the gradient of what comes out."""
    chance = torch.Generator().manual_seed(0)
    of_keys = int(rows.key_bounds[-1])
    sizes = [(rows.num_tokens, HEADS), (of_keys, KV_HEADS), (of_keys, KV_HEADS), (rows.num_tokens, HEADS)]
    return [torch.randn(n, heads, SIZE, generator=chance, dtype=torch.float64).to(dtype) for n, heads in sizes]


def output_and_gradients(attend: Any, drawn: list[Tensor], rows: Rows, sight: Sight) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in drawn[:3]]
    out = attend(*inputs, rows, sight)
    return [out.detach(), *torch.autograd.grad(out, inputs, drawn[3].to(out.dtype))]


def relative(ours: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_output_and_every_gradient_are_those_of_tiles(sight, rows, uncompiled):
    drawn = draw(rows, torch.float64)
    ours = output_and_gradients(attend_flexibly, drawn, rows, sight)
    assert relative(ours, output_and_gradients(attend_in_blocks, drawn, rows, sight)) < 1e-12


FEW_ROWS = {
    "whole rows": Rows.of([3, 140, 1, 20]),
    "behind a prefix": Rows.of([20, 130, 2], prefix=20),
    "one row": ROWS["one row"],
}


def by_hand(rows: Rows, sight: Sight) -> Tensor:
    """(N, M) bool: whom each query sees."""
    seen = torch.zeros(rows.num_tokens, int(rows.key_bounds[-1]), dtype=torch.bool)
    for row, keys, offset in zip(rows.slices(), rows.key_slices(), rows.offsets, strict=True):
        for query, key in itertools.product(range(row.start, row.stop), range(keys.start, keys.stop)):
            distance = offset + query - row.start - (key - keys.start)
            near = sight.window is None or abs(distance) < sight.window
            seen[query, key] = near and (distance >= 0 or not sight.causal)
    return seen


@pytest.mark.parametrize("rows", FEW_ROWS.values(), ids=FEW_ROWS)
@pytest.mark.parametrize("sight", [sight for sight in SIGHTS if sight.softcap is None], ids=str)
def test_no_pair_that_sees_each_other_lies_in_a_block_left_out(sight, rows):
    from torch.nn.attention.flex_attention import create_mask

    mask, seen = block_mask(rows, sight), by_hand(rows, sight)
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, *seen.shape, device="cpu")[0, 0], seen)
    computed = mask.to_dense()[0, 0].bool().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    assert not (seen & ~computed[: seen.shape[0], : seen.shape[1]]).any()


def test_blocks_of_other_rows_and_beyond_the_window_are_left_out():
    alone = block_mask(Rows.of([BLOCK] * 4), Sight(0.3)).to_dense()[0, 0]
    assert torch.equal(alone, torch.eye(4, dtype=alone.dtype))
    causal = block_mask(Rows.of([4 * BLOCK]), Sight(0.3)).to_dense()[0, 0]
    assert torch.equal(causal, torch.ones(4, 4, dtype=causal.dtype).tril())
    near = block_mask(Rows.of([4 * BLOCK]), Sight(0.3, window=2)).to_dense()[0, 0]
    assert int(near.sum()) == 4 + 3, "its own block, and the last token of the one before"


def test_a_mask_is_made_once_for_a_batch_and_anew_for_another():
    sight = Sight(0.3, window=3)
    mask = block_mask(Rows.of([9, 4]), sight)
    assert block_mask(Rows.of([9, 4]), replace(sight, softcap=2.0)) is mask, "the cap is no matter of who sees whom"
    assert block_mask(Rows.of([4, 9]), sight) is not mask
    assert block_mask(Rows.of([9, 4]), Sight(0.3)) is not mask


def test_it_is_used_only_where_a_trial_gives_the_same(uncompiled, monkeypatch):
    (q, k, _, _), sight = draw(ROWS["one row"], torch.bfloat16), Sight(0.3, softcap=5.0)
    assert can_attend_flexibly(q, k, sight)
    assert reasons_against() == []
    right = flexible_attention.attend_flexibly

    def fails(*args: Any) -> Tensor:
        raise RuntimeError("out of shared memory")

    other = "it gives something else"
    for wrong, reason in (
        (lambda *args: right(*args) * 2, other),
        (lambda *args: right(*args).detach() + sum(x.sum() for x in args[:3]) * 0, other),
        (fails, "out of shared memory"),
    ):
        flexible_attention._why_not.cache_clear()
        monkeypatch.setattr(flexible_attention, "attend_flexibly", wrong)
        assert not can_attend_flexibly(q, k, sight)
        assert not can_attend_flexibly(q, k, sight), "tried once"
        assert reasons_against() == [reason]
        assert reasons_against() == [], "and told once"
    flexible_attention._why_not.cache_clear()


@pytest.mark.parametrize("works", [True, False])
def test_on_cuda_soft_caps_and_short_windows_go_there_or_through_tiles_or_row_by_row(works, monkeypatch):
    """Rows that stand for CUDA's: each way is a stand-in that says its name."""
    called: list[str] = []
    for name in ("_flash", "attend_flexibly", "attend_in_blocks", "_row_by_row"):
        monkeypatch.setattr(attention, name, lambda *args, name=name: called.append(name))
    monkeypatch.setattr(attention, "can_attend_flexibly", lambda *args: works)

    def way(
        sight: Sight, rows: Rows = ROWS["one row"], dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0
    ) -> str:
        q, k, v, _ = draw(rows, dtype)
        attention.attend_rows(q, k, v, replace(rows, stands_for="cuda", source=lambda _, *kept: kept), sight, dropout)
        return called.pop()

    capped, begun = Sight(0.3, softcap=5.0), Rows.of([7]).part([0], [3])
    assert way(Sight(0.3)) == way(Sight(0.3, window=3)) == way(Sight(0.3, causal=False), begun) == "_flash"
    assert way(capped) == ("attend_flexibly" if works else "attend_in_blocks")
    assert way(Sight(0.3, causal=False, window=3), begun) == way(Sight(0.3), begun)
    assert way(Sight(0.3), begun) == ("attend_flexibly" if works else "_row_by_row")
    assert way(capped, dropout=0.1) == way(capped, dtype=torch.float32) == "attend_in_blocks"
    assert way(Sight(0.3), dropout=0.1) == way(Sight(0.3), dtype=torch.float32) == "_row_by_row"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # by torch's own compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own import
def test_the_compiler_makes_of_them_what_they_say():
    """In earnest, as far as torch's kernel for CPUs goes: no gradients, one batch, as many keys as queries.

    A cap that is a number and no tensor fails there.
    """
    rows = ROWS["whole rows"]
    q, k, v, _ = draw(rows, torch.float32)
    for sight in (Sight(0.3, softcap=5.0), Sight(0.3, window=140, softcap=5.0), Sight(0.3, False, 3)):
        with torch.no_grad():
            ours = attend_flexibly(q, k, v, rows, sight)
            exact = attend_in_blocks(q.double(), k.double(), v.double(), rows, sight)
        assert relative([ours], [exact]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_on_a_gpu_the_compiled_kernel_gives_the_same(sight, rows):
    device, drawn = torch.device("cuda"), draw(rows, torch.bfloat16)
    exact = output_and_gradients(attend_in_blocks, [x.double() for x in drawn], rows, sight)
    found = output_and_gradients(attend_flexibly, [x.to(device) for x in drawn], rows.to(device), sight)
    assert can_attend_flexibly(drawn[0].to(device), drawn[1].to(device), sight)
    assert relative([x.cpu() for x in found], exact) < 2e-2
