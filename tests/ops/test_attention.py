"""Attention among the tokens of each row, against softmax written out in float64 with a mask made by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.ops import attention, blocked_attention
from lora_cli.ops.attention import attend_rows
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import Sight

LENGTHS = [5, 70, 1, 3, 130, 33, 40]  # neighbours of like length are computed together
HEADS, KV_HEADS, SIZE = 6, 2, 16
SIGHTS = [
    Sight(0.3, causal, window, softcap)
    for causal, window, softcap in itertools.product((True, False), (None, 3, 64), (None, 5.0))
]


def draw(dtype: torch.dtype, lengths: list[int] = LENGTHS) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(sum(lengths), heads, SIZE, generator=generator, dtype=torch.float64).to(dtype)

    return [normal(HEADS), normal(KV_HEADS), normal(KV_HEADS)], normal(HEADS)


def sees(t: int, u: int, sight: Sight) -> bool:
    return (u <= t or not sight.causal) and (sight.window is None or abs(t - u) < sight.window)


def by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], sight: Sight) -> Tensor:
    rows, start = [], 0
    for length in lengths:
        inside = slice(start, start + length)
        start += length
        group = HEADS // KV_HEADS
        keys, values = (t[inside].repeat_interleave(group, 1) for t in (k, v))
        scores = sight.scaling * torch.einsum("thd,uhd->htu", q[inside], keys)
        if sight.softcap is not None:
            scores = sight.softcap * torch.tanh(scores / sight.softcap)
        hidden = torch.tensor([[not sees(t, u, sight) for u in range(length)] for t in range(length)])
        p = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        rows.append(torch.einsum("htu,uhd->thd", p, values))
    return torch.cat(rows)


def output_and_gradients(inputs: list[Tensor], gradient: Tensor, formula: Any) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = formula(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]


def relative(ours: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_output_and_every_gradient_are_the_formula_s(sight, dtype, limit):
    inputs, gradient = draw(dtype)
    rows = Rows.of(LENGTHS)
    ours = output_and_gradients(inputs, gradient, lambda q, k, v: attend_rows(q, k, v, rows, sight))
    exact = output_and_gradients(
        [t.double() for t in inputs], gradient.double(), lambda q, k, v: by_hand(q, k, v, LENGTHS, sight)
    )
    assert ours[0].dtype == dtype
    assert relative(ours, exact) < limit


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_the_way_row_by_row_is_the_same(sight):
    inputs, gradient = draw(torch.float32)
    rows = Rows.of(LENGTHS)
    ours = output_and_gradients(inputs, gradient, lambda q, k, v: attention._row_by_row(q, k, v, rows, sight, 0.0))
    exact = output_and_gradients(inputs, gradient, lambda q, k, v: by_hand(q, k, v, LENGTHS, sight))
    assert relative(ours, exact) < 1e-5


PREFIX, OWN = 37, [5, 70, 1, 3]
CAUSAL = [sight for sight in SIGHTS if sight.causal]


def expanded(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """By hand: every row with its own copy of the prefix; what the copies give is left out."""
    places, start = [], PREFIX
    for length in OWN:
        places.append(torch.cat([torch.arange(PREFIX), torch.arange(start, start + length)]))
        start += length
    lengths = [PREFIX, *(PREFIX + length for length in OWN)]
    whole = torch.cat([torch.arange(PREFIX), *places])
    out = by_hand(q[whole], k[whole], v[whole], lengths, sight)
    firsts = [0, *itertools.accumulate(lengths)]
    own = [out[first + PREFIX : first + length] for first, length in zip(firsts[1:], lengths[1:], strict=False)]
    return torch.cat([out[:PREFIX], *own])


def row_by_row(q: Tensor, k: Tensor, v: Tensor, rows: Rows, sight: Sight) -> Tensor:
    return attention._row_by_row(q, k[rows.key_places], v[rows.key_places], rows, sight, 0.0)


@pytest.mark.parametrize("way", [attend_rows, row_by_row])
@pytest.mark.parametrize("sight", CAUSAL, ids=str)
def test_rows_see_a_shared_prefix_as_if_each_had_its_own(sight, way):
    rows = Rows.of([PREFIX, *OWN], prefix=PREFIX)
    inputs, gradient = draw(torch.float64, list(rows.lengths))
    ours = output_and_gradients(inputs, gradient, lambda q, k, v: way(q, k, v, rows, sight))
    exact = output_and_gradients(inputs, gradient, lambda q, k, v: expanded(q, k, v, sight))
    assert relative(ours, exact) < 1e-12


def test_in_bfloat16_it_is_no_less_exact_than_torch_s_own_kernel():
    inputs, gradient = draw(torch.bfloat16)
    rows, sight = Rows.of(LENGTHS), Sight(SIZE**-0.5)
    exact = output_and_gradients(
        [t.double() for t in inputs], gradient.double(), lambda q, k, v: by_hand(q, k, v, LENGTHS, sight)
    )
    ours = output_and_gradients(inputs, gradient, lambda q, k, v: attend_rows(q, k, v, rows, sight))
    torchs = output_and_gradients(inputs, gradient, lambda q, k, v: attention._row_by_row(q, k, v, rows, sight, 0.0))
    assert relative(ours, exact) <= relative(torchs, exact)


def test_no_row_sees_another_bit_for_bit():
    inputs, _ = draw(torch.float32)
    rows, sight = Rows.of(LENGTHS), Sight(0.3)
    before = attend_rows(*inputs, rows, sight)
    for tensor in inputs:
        tensor[5:75] += 1.0  # the second row
    after = attend_rows(*inputs, rows, sight)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[75:], after[75:])
    assert not torch.equal(before[5:75], after[5:75])


def test_short_rows_are_computed_together_and_windows_to_both_sides_alone():
    lengths = tuple(LENGTHS)
    together = blocked_attention._groups(lengths, 0, HEADS, KV_HEADS, torch.float32, Sight(0.3))
    assert [group.lengths for _, _, group in together] == [(5,), (70,), (1, 3), (130,), (33, 40)]
    assert [some.stop for some, _, _ in together] == [5, 75, 79, 209, 282]
    alone = blocked_attention._groups(lengths, 0, HEADS, KV_HEADS, torch.float32, Sight(0.3, causal=False, window=4))
    assert [group.lengths for _, _, group in alone] == [(length,) for length in lengths]
    many = blocked_attention._groups((60,) * 40, 0, HEADS, KV_HEADS, torch.float32, Sight(0.3))
    assert max(len(group.lengths) for _, _, group in many) == 2**19 // (HEADS * 64 * 64)


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_probabilities_kept_or_made_again_are_the_same_bits(sight, monkeypatch):
    inputs, gradient = draw(torch.bfloat16)
    rows = Rows.of(LENGTHS)
    found = {}
    for kept_keys in (0, 64, 512):  # of none, of some and of all rows
        monkeypatch.setattr(blocked_attention, "KEPT_KEYS", kept_keys)
        found[kept_keys] = output_and_gradients(inputs, gradient, lambda q, k, v: attend_rows(q, k, v, rows, sight))
    for kept_keys in (64, 512):
        assert all(torch.equal(one, other) for one, other in zip(found[0], found[kept_keys], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept_keys", [0, 512])
@pytest.mark.parametrize("prefix", [0, PREFIX])
def test_what_is_kept_are_the_probabilities_of_short_rows(prefix, kept_keys, dtype, monkeypatch):
    monkeypatch.setattr(blocked_attention, "KEPT_KEYS", kept_keys)
    rows = Rows.of([PREFIX, *OWN], prefix=PREFIX) if prefix else Rows.of(OWN)
    (q, k, v), _ = draw(dtype, list(rows.lengths))
    k, v = k[rows.key_places], v[rows.key_places]
    kept: list[int] = []
    inputs = [t.requires_grad_() for t in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        blocked_attention.attend_in_blocks(*inputs, rows, Sight(0.3))
    groups = blocked_attention._groups(rows.lengths, rows.prefix, HEADS, KV_HEADS, dtype, Sight(0.3))
    expected = sum(group.num_probabilities for *_, group in groups) if kept_keys and dtype.itemsize == 2 else 0
    assert sum(kept) - sum(t.numel() for t in inputs) == expected
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(-1) or t, lambda t: t):
        blocked_attention.attend_in_blocks(*inputs, rows, Sight(0.3))
    assert -1 not in kept, "an evaluation keeps nothing"


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_an_odd_number_of_products_is_cut_in_two_parts(kv_heads, monkeypatch):
    """The same numbers in another order of queries; neither more nor less exact."""
    q, gradient = (
        torch.randn(100, 6 if kv_heads == 3 else 4, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1)
    )
    k, v = (torch.randn(100, kv_heads, 16, generator=torch.Generator().manual_seed(s)) for s in (2, 3))
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        blocked_attention._groups.cache_clear()
        groups = blocked_attention._groups((100,), 0, q.shape[1], kv_heads, torch.float32, Sight(0.25))
        assert [group.parts for *_, group in groups] == [threads]
        found.append(output_and_gradients([q, k, v], gradient, lambda *t: attend_rows(*t, Rows.of([100]), Sight(0.25))))
    blocked_attention._groups.cache_clear()
    assert relative(found[1], found[0]) < 1e-6


def test_dropout_is_drawn_and_leaves_the_mean_where_it_was():
    inputs, _ = draw(torch.float32, [40])
    rows, sight = Rows.of([40]), Sight(0.3)
    without = attend_rows(*inputs, rows, sight)
    torch.manual_seed(0)
    drawn = torch.stack([attend_rows(*inputs, rows, sight, dropout=0.2) for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    assert float((drawn.mean(0) - without).norm() / without.norm()) < 0.05


SIGNATURES = {
    "2.10": {"is_causal"},
    "2.11": {"scale", "window_size"},
    "2.12 and later": {"scale", "window_size", "enable_gqa"},
}


@pytest.mark.parametrize("parameters", SIGNATURES.values(), ids=SIGNATURES)
@pytest.mark.parametrize("sight", [s for s in SIGHTS if s.softcap is None], ids=str)
def test_flash_attention_is_asked_for_the_same_thing_in_every_torch(sight, parameters, monkeypatch):
    """The CUDA kernel itself needs a GPU; what it is told is read back here by a stand-in that obeys."""
    inputs, _ = draw(torch.float32)
    rows = Rows.of(LENGTHS)

    def stand_in(q, k, v, bounds_q, bounds_k, longest_q, longest_k, **options):
        assert options.keys() <= parameters
        assert bounds_q is bounds_k is rows.bounds
        assert longest_q == longest_k == max(LENGTHS)
        left, right = options.get("window_size", (-1, 0 if options.get("is_causal") else -1))
        assert left == -1 or right in (0, left)
        window = None if left == -1 else left + 1
        scale = options.get("scale", SIZE**-0.5)
        if not options.get("enable_gqa"):
            assert k.shape[1] == HEADS
            k, v = k[:, :: HEADS // KV_HEADS], v[:, :: HEADS // KV_HEADS]
        return by_hand(q, k, v, LENGTHS, Sight(scale, right == 0, window))

    monkeypatch.setattr(attention, "_varlen_parameters", lambda: frozenset(parameters))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    out = attention._flash(*inputs, rows, sight)
    assert relative([out], [by_hand(*inputs, LENGTHS, sight)]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("sight", SIGHTS, ids=str)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_on_a_gpu_output_and_every_gradient_are_the_formula_s(sight, dtype, limit):
    inputs, gradient = draw(dtype)
    rows = Rows.of(LENGTHS).to(torch.device("cuda"))
    ours = output_and_gradients(
        [t.cuda() for t in inputs], gradient.cuda(), lambda q, k, v: attend_rows(q, k, v, rows, sight)
    )
    exact = output_and_gradients(
        [t.double() for t in inputs], gradient.double(), lambda q, k, v: by_hand(q, k, v, LENGTHS, sight)
    )
    assert relative([t.cpu() for t in ours], exact) < limit
