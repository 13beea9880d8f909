"""The sum of token losses, against closed forms."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from lora_cli.ops.cross_entropy import summed_cross_entropy


def draw(n: int, v: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, v, generator=generator), torch.randint(v, (n,), generator=generator)


def test_against_the_definition_in_float64():
    logits_NV, targets_N = draw(40, 300)
    expected = 0.0
    for row, target in zip(logits_NV.double().tolist(), targets_N.tolist(), strict=True):
        expected += math.log(sum(math.exp(value) for value in row)) - row[target]
    assert abs(float(summed_cross_entropy(logits_NV, targets_N)) - expected) < 1e-6 * expected


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    loss = summed_cross_entropy(torch.zeros(7, 320), torch.arange(7))
    assert abs(float(loss) - 7 * math.log(320)) < 1e-5


def test_parts_add_up():
    """So micro-batches of any cut are the same step."""
    logits_NV, targets_N = draw(24, 50)
    whole = summed_cross_entropy(logits_NV, targets_N)
    for size in (1, 5, 12):
        parts = sum(summed_cross_entropy(logits_NV[i : i + size], targets_N[i : i + size]) for i in range(0, 24, size))
        assert torch.allclose(parts, whole, rtol=1e-6, atol=0)


def test_gradient_is_softmax_less_the_target():
    logits_NV, targets_N = draw(6, 9)
    logits_NV.requires_grad_(True)
    summed_cross_entropy(logits_NV, targets_N).backward()
    expected = logits_NV.detach().softmax(-1) - F.one_hot(targets_N, 9)
    assert torch.allclose(logits_NV.grad, expected, rtol=0, atol=1e-6)


def test_half_precision_logits_are_summed_in_float32():
    """In bfloat16 the sum of 40 losses would be off by whole percents."""
    logits_NV, targets_N = draw(40, 300)
    halved = logits_NV.bfloat16()
    loss = summed_cross_entropy(halved, targets_N)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, summed_cross_entropy(halved.float(), targets_N))
    assert loss != F.cross_entropy(halved, targets_N, reduction="sum").float()


def test_large_logits_do_not_overflow():
    logits_NV = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    assert float(summed_cross_entropy(logits_NV, torch.tensor([0, 0]))) == 1e4


def test_no_targets_cost_nothing():
    assert float(summed_cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))) == 0.0
