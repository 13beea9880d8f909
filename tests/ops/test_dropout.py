"""Dropout: how often, of which numbers, and what comes back through it."""

from __future__ import annotations

import pytest
import torch

from lora_cli.ops.dropout import LEVELS, draw_mask, dropout, masked, scale_of

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("share", [1 / LEVELS, 0.05, 0.1, 0.5, 0.9, 1 - 1 / LEVELS])
def test_each_number_falls_with_the_chance_that_was_asked_for(share):
    """Within five standard deviations, in all and in each of the four places that share a draw."""
    torch.manual_seed(0)
    dropped = draw_mask((1000, 1024), share, CPU) == 0
    for some in (dropped, *(dropped.flatten()[place::4] for place in range(4))):
        expected = share * some.numel()
        assert abs(int(some.sum()) - expected) <= 5 * (expected * (1 - share)) ** 0.5 + 1
    assert scale_of(share) == pytest.approx(1 / (1 - share), rel=1e-4)


def test_no_number_falls_with_its_neighbours():
    """The chance that two fall together is the product of theirs, however far apart they are drawn."""
    torch.manual_seed(1)
    share, dropped = 0.3, draw_mask((2**20,), 0.3, CPU) == 0
    for apart in (1, 2, 3, 4, 5, 8, 64):
        both = float((dropped[apart:] & dropped[:-apart]).float().mean())
        assert both == pytest.approx(share**2, abs=5 * (share**2 / 2**20) ** 0.5)


def test_the_ends_of_the_scale():
    torch.manual_seed(0)
    few = 50 * LEVELS
    dropped = int((draw_mask((few,), 1e-9, CPU) == 0).sum())  # never is rounded to one in 65,536
    assert 15 < dropped < 100
    assert not draw_mask((1000,), 1.0, CPU).any()
    assert float(dropout(torch.ones(1000), 1.0).abs().max()) == 0
    assert draw_mask((0, 3), 0.5, CPU).shape == (0, 3)
    assert draw_mask((5,), 0.5, CPU).shape == (5,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_stays_is_the_same_number_and_what_falls_is_zero(dtype):
    torch.manual_seed(0)
    x = torch.randn(33, 17).to(dtype)
    mask = draw_mask(x.shape, 0.4, CPU)
    for given, its_mask in ((x, mask), (x.T, mask.T), (x[::2], mask[::2])):
        before = given.clone()
        assert torch.equal(masked(given, its_mask), torch.where(its_mask.bool(), given, 0))
        assert torch.equal(given, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_goes_where_the_number_went(dtype):
    torch.manual_seed(0)
    x = (torch.rand(200, 30) + 1).to(dtype).requires_grad_()
    y = dropout(x, 0.25)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.dtype == y.dtype == dtype
    scale = torch.tensor(scale_of(0.25), dtype=dtype)
    assert torch.equal(gradient, torch.where(y == 0, 0, scale.expand_as(y)))
    assert 0.2 < float((y == 0).float().mean()) < 0.3
    assert torch.equal(y, torch.where(y == 0, 0, x.detach() * scale_of(0.25)))


def test_a_seed_repeats_the_draw_and_a_generator_leaves_the_process_s_alone():
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(draw_mask((100,), 0.5, CPU))
    assert torch.equal(*draws)
    before = torch.get_rng_state()
    own = [draw_mask((100,), 0.5, CPU, torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*own)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(own[0], draws[0])


@pytest.mark.gpu
def test_on_a_gpu_each_number_falls_with_the_chance_that_was_asked_for():
    dropped = draw_mask((1000, 1024), 0.1, torch.device("cuda")) == 0
    assert float(dropped.float().mean()) == pytest.approx(0.1, abs=0.002)
