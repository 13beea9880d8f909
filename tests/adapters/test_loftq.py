"""LoftQ on single matrices: against its algorithm written out in float64, and the best that any factors could do."""

from __future__ import annotations

import pytest
import torch

from lora_cli.adapters import loftq
from lora_cli.adapters.loftq import KINDS, decompose, leading
from lora_cli.ops.packing import Packed
from lora_cli.seeds import stream

SHAPE, R, SCALING = (96, 128), 8, 1.5


def weight(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    """Some directions are larger than others, as in trained weights."""
    chance = stream(0, "loftq test")
    flat = torch.randn(shape, generator=chance)
    tall = torch.randn(shape[0], 4, generator=chance) @ torch.randn(4, shape[1], generator=chance)
    return (0.02 * (flat + tall)).to(dtype)


def by_turns(weight_OI: torch.Tensor, kind: str, iterations: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(Q, s B A, ||W - Q - s B A|| / ||W||) of the paper's algorithm 1; only quantizing is shared with ours."""
    update = torch.zeros(SHAPE, dtype=torch.float64)
    for _ in range(iterations):
        quantized = Packed.of((weight_OI.double() - update).to(weight_OI.dtype), kind).weight().double()
        u, s, vh = torch.linalg.svd(weight_OI.double() - quantized)
        update = u[:, :R] @ torch.diag(s[:R]) @ vh[:R]
    error = torch.linalg.norm(weight_OI.double() - quantized - update) / torch.linalg.norm(weight_OI.double())
    return quantized, update, float(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_it_is_the_papers_algorithm(bits, iterations, dtype):
    original = weight(dtype)
    found = decompose(original, KINDS[bits], R, SCALING, iterations)
    quantized, update, _ = by_turns(original, KINDS[bits], iterations)
    errors = [by_turns(original, KINDS[bits], turn)[2] for turn in range(1, iterations + 1)]
    assert found.error == pytest.approx(min(errors), rel=1e-5)
    if errors[-1] == min(errors):  # else an earlier turn was the best
        ours = SCALING * found.lora_B.double() @ found.lora_A.double()
        moved = (found.packed.weight() - quantized).abs() > 1e-5 * original.abs().max()
        assert moved.double().mean() < 2e-3, "a last bit of float32 may put a weight on the other side of a boundary"
        assert torch.linalg.norm(ours - update) < 2e-2 * torch.linalg.norm(update)
        if iterations == 1:
            assert not moved.any()
            torch.testing.assert_close(ours, update, rtol=1e-4, atol=1e-5 * float(update.abs().max()))
    again = decompose(original, KINDS[bits], R, SCALING, iterations)
    assert torch.equal(again.lora_A, found.lora_A), "the same bits each time"


@pytest.mark.parametrize("bits", KINDS)
def test_the_error_is_below_plain_quantizations_and_what_it_says(bits):
    original = weight()
    found = decompose(original, KINDS[bits], R, SCALING, 5)
    plain = Packed.of(original, KINDS[bits]).weight()
    norm = torch.linalg.norm(original)
    assert found.plain_error == pytest.approx(float(torch.linalg.norm(original - plain) / norm), rel=1e-5)
    off = original - found.packed.weight() - SCALING * found.lora_B @ found.lora_A
    assert found.error == pytest.approx(float(torch.linalg.norm(off) / norm), rel=1e-4)
    assert found.error < 0.95 * found.plain_error
    once = decompose(original, KINDS[bits], R, SCALING, 1)
    assert found.error <= once.error
    without_scale = original - found.packed.weight() - found.lora_B @ found.lora_A
    assert torch.linalg.norm(without_scale) > 1.01 * torch.linalg.norm(off), "the scale counts"


def test_factors_are_the_best_of_their_rank():
    """Eckart and Young: what is left are the other singular values."""
    matrix = weight()
    a_RI, b_OR = leading(matrix, R, SCALING)
    left = torch.linalg.norm(matrix - SCALING * b_OR @ a_RI)
    values = torch.linalg.svdvals(matrix.double())
    assert float(left) == pytest.approx(float(values[R:].square().sum().sqrt()), rel=1e-5)
    torch.testing.assert_close(torch.linalg.norm(a_RI, dim=1), torch.linalg.norm(b_OR, dim=0))


def test_large_matrices_take_the_short_way_and_lose_little(monkeypatch):
    """On what quantizing loses, which has no few large directions: the worst that iteration can meet."""
    lost = weight() - Packed.of(weight(), "nf4").weight()
    exact_a, exact_b = leading(lost, R, SCALING)
    monkeypatch.setattr(loftq, "EXACT", 0)
    before = torch.get_rng_state()
    a_RI, b_OR = leading(lost, R, SCALING)
    assert torch.equal(torch.get_rng_state(), before), "what others draw stays as it was"
    caught, most = (torch.linalg.norm(b @ a) for b, a in ((b_OR, a_RI), (exact_b, exact_a)))
    assert 0.99 * most < caught <= most * (1 + 1e-5)
    again, _ = leading(lost, R, SCALING)
    assert torch.equal(again, a_RI)


def test_a_matrix_of_zeros_is_left_alone():
    found = decompose(torch.zeros(SHAPE), "nf4", R, SCALING, 2)
    assert found.error == found.plain_error == 0
    assert torch.isfinite(found.lora_A).all() and torch.isfinite(found.lora_B).all()
