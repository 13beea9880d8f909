"""Shrinking is the truncated singular value decomposition, and the energy kept is its closed form."""

from __future__ import annotations

import pytest
import torch

from lora_cli.adapters.adapter import LowRank
from lora_cli.adapters.shrinking import least_rank, shrink_update
from tests.adapters.test_spectrum import SHAPES, dense, made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_shrunk_update_is_the_truncated_dense_one(shape, rank):
    update = made(*shape)
    shrunk = shrink_update(update, rank=rank)
    u, values, v = torch.linalg.svd(dense(update), full_matrices=False)
    best = u[:, :rank] * values[:rank] @ v[:rank]
    assert float((dense(shrunk.update) - best).abs().max()) < 1e-6 * float(values[0])
    closed = float(values[:rank].square().sum() / values.square().sum())
    assert shrunk.energy == pytest.approx(closed, abs=1e-12)
    left = float((dense(update) - dense(shrunk.update)).norm() / values.norm())
    assert left**2 == pytest.approx(1 - closed, abs=1e-6)  # what was lost is what was not kept


def test_the_shape_the_scale_and_the_type_are_kept():
    update = made(8, 20, 30)
    half = LowRank(update.lora_A.half(), update.lora_B.half(), update.scaling)
    shrunk = shrink_update(half, rank=3).update
    assert shrunk.lora_A.shape == (3, 20)
    assert shrunk.lora_B.shape == (30, 3)
    assert shrunk.scaling == update.scaling
    assert {shrunk.lora_A.dtype, shrunk.lora_B.dtype} == {torch.float16}


@pytest.mark.parametrize("wish", [{"rank": 8}, {"rank": 100}, {"keep_energy": 1.0}])
def test_at_full_rank_nothing_changes(wish):
    update = made(8, 20, 30)
    shrunk = shrink_update(update, **wish)
    assert shrunk.energy == 1
    assert torch.equal(shrunk.update.lora_A, update.lora_A)
    assert torch.equal(shrunk.update.lora_B, update.lora_B)


@pytest.mark.parametrize("shape", [(12, 8, 30), (12, 30, 8)])
def test_a_rank_above_the_layer_s_own_shrinks_without_loss(shape):
    update = made(*shape)
    shrunk = shrink_update(update, rank=11)
    assert len(shrunk.update.lora_A) == 8
    assert shrunk.energy == 1
    assert float((dense(shrunk.update) - dense(update)).abs().max()) < 1e-6 * float(dense(update).norm())


def test_the_least_rank_keeps_the_energy_and_one_less_does_not():
    values = torch.tensor([3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1 of 15
    for energy, rank in ((0.1, 1), (0.6, 1), (0.61, 2), (13 / 15, 2), (0.9, 3), (14 / 15, 3), (0.94, 4), (1.0, 4)):
        assert least_rank(values, energy) == rank, energy
    assert least_rank(torch.zeros(4), 0.99) == 1


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_keep_energy_gives_the_least_rank(energy):
    update = made(8, 20, 30)
    shrunk = shrink_update(update, keep_energy=energy)
    rank = len(shrunk.update.lora_A)
    assert shrunk.energy >= energy
    assert rank == 1 or shrink_update(update, rank=rank - 1).energy < energy


def test_an_update_of_lower_true_rank_shrinks_to_it_without_loss():
    update = made(2, 20, 30)
    doubled = LowRank(torch.cat([update.lora_A] * 3), torch.cat([update.lora_B] * 3, 1), update.scaling)
    shrunk = shrink_update(doubled, keep_energy=1 - 1e-9)
    assert len(shrunk.update.lora_A) == 2
    assert float((dense(shrunk.update) - dense(doubled)).abs().max()) < 1e-5


def test_a_zero_update_stays_one():
    zero = LowRank(torch.ones(4, 6), torch.zeros(5, 4), 2.0)
    shrunk = shrink_update(zero, keep_energy=0.99)
    assert len(shrunk.update.lora_A) == 1
    assert shrunk.energy == 1
    assert not shrunk.update.lora_B.any()
