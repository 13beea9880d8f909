"""The sum of token losses, against closed forms; with the head in it, against float64 and its own parts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lora_cli.ops import cross_entropy
from lora_cli.ops.cross_entropy import Head, head_loss, head_statistics, summed_cross_entropy


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


# --- the head and the loss in one

M, D, V = 23, 12, 50
HEADS = {
    "plain": {},
    "with a bias": {"bias": True},
    "scaled, as Cohere's and Granite's": {"scale": 0.0625},
    "capped, as Gemma 2's": {"softcap": 3.0},
    "scaled and capped": {"scale": 2.0, "softcap": 3.0, "bias": True},
}


def head_of(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, Head, torch.Tensor]:
    options = dict(HEADS[kind])
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    bias = normal(V) if options.pop("bias", False) else None
    return normal(M, D), Head(normal(V, D), bias, **options), torch.randint(V, (M,), generator=generator)


def plain_loss(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


def loss_and_gradients(formula, hidden, head, targets, *, trained: bool):
    hidden = hidden.detach().requires_grad_()
    parameters = [t.detach().requires_grad_(trained) for t in (head.weight, head.bias) if t is not None]
    bias = parameters[1] if head.bias is not None else None
    loss = formula(hidden, Head(parameters[0], bias, head.scale, head.softcap), targets)
    wanted = [hidden, *(parameters if trained else [])]
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, wanted)]


@pytest.mark.parametrize(("chunk", "wide"), [(1, 1), (7, 2), (7, 7), (1000, 3), (1000, 1000)])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_loss_and_every_gradient_are_the_formula_s_in_any_cut(dtype, limit, kind, chunk, wide, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", {"cpu": chunk * V})
    monkeypatch.setattr(cross_entropy, "WIDE_LOGITS", {"cpu": wide * V})
    hidden, head, targets = head_of(kind, dtype)
    ours = loss_and_gradients(head_loss, hidden, head, targets, trained=True)
    bias = None if head.bias is None else head.bias.double()
    exact_head = Head(head.weight.double(), bias, head.scale, head.softcap)
    exact = loss_and_gradients(plain_loss, hidden.double(), exact_head, targets, trained=True)
    for one, other in zip(ours, exact, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < limit
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("kind", HEADS)
def test_other_rows_of_some_words_get_their_gradient_in_any_cut(kind, chunk, monkeypatch):
    """Against the same table written out, in float64: hidden states, the rest of the table, and the rows."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", {"cpu": chunk * V})
    hidden, head, targets = head_of(kind, torch.float64)
    ids = torch.tensor(sorted({5, 0, int(targets[0])}, reverse=True))
    leaves = [t.clone().requires_grad_() for t in (hidden, head.weight, 0.1 * head.weight[ids])]
    written = replace(head, weight=leaves[1].index_copy(0, ids, leaves[2]))
    exact = torch.autograd.grad(plain_loss(leaves[0], written, targets) * 0.37, leaves)
    ours_head = replace(head, weight=leaves[1], ids_T=ids, rows_TD=leaves[2])
    ours = torch.autograd.grad(head_loss(leaves[0], ours_head, targets) * 0.37, leaves)
    for one, other in zip(ours, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-12
    assert float((exact[0] - loss_and_gradients(plain_loss, hidden, head, targets, trained=False)[1]).norm()) > 1e-2


def test_the_cap_and_the_scale_matter():
    losses = {kind: float(head_loss(*head_of(kind, torch.float32))) for kind in HEADS}
    assert len({round(loss, 2) for loss in losses.values()}) == len(HEADS)


def test_a_frozen_head_gets_no_gradient_and_all_logits_never_exist(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", {"cpu": 4 * V})
    hidden, head, targets = head_of("plain", torch.float32)
    made = []
    linear = F.linear
    monkeypatch.setattr(cross_entropy.F, "linear", lambda *a: made.append(linear(*a)) or made[-1])
    loss_and_gradients(head_loss, hidden, head, targets, trained=False)
    assert {len(t) for t in made} == {4, M % 4}
    assert head.weight.grad is None


@pytest.mark.parametrize("wide", [2, 5])
def test_logits_are_widened_a_few_at_a_time(wide, monkeypatch):
    monkeypatch.setattr(cross_entropy, "WIDE_LOGITS", {"cpu": wide * V})
    hidden, head, targets = head_of("plain", torch.bfloat16)
    widened: list[int] = []
    true_wide = cross_entropy.wide
    monkeypatch.setattr(cross_entropy, "wide", lambda t: widened.append(len(t)) or true_wide(t))
    head_loss(hidden, head, targets)
    assert set(widened) == {wide, M % wide} - {0}


def test_a_loss_of_hundreds_of_nats_is_exact_where_its_probability_is_zero():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [300.0]])
    assert float(head_loss(hidden, Head(weight), torch.tensor([0]))) == 300.0


@pytest.mark.parametrize("kind", HEADS)
def test_statistics_are_those_of_all_logits_at_once(kind, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", {"cpu": 3 * V})
    hidden, head, targets = head_of(kind, torch.float32)
    targets[::2] = head.logits(hidden).argmax(-1)[::2]
    loss, right = head_statistics(hidden, head, targets)
    torch.testing.assert_close(loss, plain_loss(hidden, head, targets), rtol=1e-5, atol=0)
    assert torch.equal(right, head.logits(hidden).argmax(-1) == targets)
    assert 0 < int(right.sum()) < M
