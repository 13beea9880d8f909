"""Norms, angles and ranks through r-sized products are those of the dense updates in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lora_cli.adapters.adapter import LowRank
from lora_cli.adapters.spectrum import (
    cosine,
    distance,
    effective_rank,
    frobenius_norm,
    inner_product,
    is_dead,
    is_finite,
    singular_values,
    spectrum,
    weighted_sum,
)
from lora_cli.seeds import stream

SHAPES = [
    (4, 20, 30),
    (8, 30, 20),
    (1, 7, 5),
    (12, 8, 30),
    (12, 30, 8),
    (16, 16, 16),
]  # R, I, O; some have R above I or O


def made(r: int, in_features: int, out_features: int, seed: int = 0, scaling: float = 1.7) -> LowRank:
    generator = stream(seed, "update")
    a_RI = torch.randn(r, in_features, generator=generator)
    return LowRank(a_RI, torch.randn(out_features, r, generator=generator), scaling)


def dense(update: LowRank) -> torch.Tensor:
    return update.scaling * update.lora_B.double() @ update.lora_A.double()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_the_dense_update(shape):
    update = made(*shape)
    expected = torch.linalg.svdvals(dense(update))
    found = singular_values(update)
    assert len(found) == min(shape)
    assert float((found - expected[: len(found)]).abs().max()) < 1e-12 * float(expected[0])
    assert float(expected[len(found) :].sum()) < 1e-12 * float(expected[0])
    assert frobenius_norm(found) == pytest.approx(float(dense(update).norm()), rel=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectrum_multiplies_back(shape):
    update = made(*shape, scaling=1.0)
    parts = spectrum(update.lora_A, update.lora_B)
    assert float((parts.u_OK * parts.values_K @ parts.v_KI - dense(update)).abs().max()) < 1e-12
    identity = torch.eye(len(parts.values_K), dtype=torch.float64)
    assert float((parts.u_OK.T @ parts.u_OK - identity).abs().max()) < 1e-13
    assert float((parts.v_KI @ parts.v_KI.T - identity).abs().max()) < 1e-13


def test_the_effective_rank_counts_equal_directions():
    for count in (1, 3, 7):
        assert effective_rank(torch.cat([torch.full((count,), 2.5), torch.zeros(4)])) == pytest.approx(count)
    assert effective_rank(torch.zeros(4)) == 0
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert effective_rank(8 * p) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


@pytest.mark.parametrize("shape", SHAPES)
def test_angles_and_distances_are_those_of_the_dense_updates(shape):
    r, *features = shape
    one, other = made(*shape), made(r + 2, *features, seed=1, scaling=-0.4)
    x, y = dense(one), dense(other)
    assert inner_product(one, other) == pytest.approx(float((x * y).sum()), rel=1e-10)
    assert cosine(one, other) == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), rel=1e-10)
    assert distance(one, other) == pytest.approx(float((x - y).norm()), rel=1e-12)
    total = weighted_sum([one, other], [0.3, -2.0])
    assert float((dense(total) - (0.3 * x - 2 * y)).abs().max()) < 1e-12


def test_an_update_is_at_no_distance_from_itself_and_points_its_own_way():
    update = made(4, 20, 30)
    assert cosine(update, update) == pytest.approx(1.0, abs=1e-14)
    assert distance(update, update) < 1e-13 * float(dense(update).norm())
    doubled = LowRank(2 * update.lora_A, update.lora_B, update.scaling)
    assert cosine(update, doubled) == pytest.approx(1.0, abs=1e-14)
    assert cosine(update, made(4, 20, 30, seed=1)) < 0.5  # the control
    assert cosine(update, LowRank(0 * update.lora_A, update.lora_B, 1.0)) is None


def test_the_dense_matrix_is_never_formed():
    """It would have 40 billion numbers here; the answer is known, since the factors' columns do not overlap."""
    a_RI, b_OR = torch.zeros(2, 200_000), torch.zeros(200_000, 2)
    a_RI[0, 7], a_RI[1, 199_999], b_OR[3, 0], b_OR[150_000, 1] = 3, 5, 2, 1
    assert singular_values(LowRank(a_RI, b_OR, 0.5)).tolist() == pytest.approx([3.0, 2.5])


def test_dead_and_not_finite_updates_are_found():
    update = made(4, 20, 30)
    assert not is_dead(update)
    assert is_finite(update)
    assert is_dead(LowRank(update.lora_A, torch.zeros(30, 4), 1.0))
    assert is_dead(LowRank(torch.zeros(4, 20), update.lora_B, 1.0))
    for value in (float("nan"), float("inf")):
        broken = update.lora_B.clone()
        broken[3, 1] = value
        assert not is_finite(LowRank(update.lora_A, broken, 1.0))
