"""The gated projection against its formula in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.ops.gated import ACTIVATIONS, gated_low_rank
from lora_cli.ops.low_rank import Projection
from tests.ops.test_low_rank import differences, in_float64, plain, recorded_masks, typed

PLAIN = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def draw(dtype: torch.dtype, *, rank: int = 3) -> tuple[Tensor, Tensor, Projection]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a, b = (normal(rank, 20) / 4, normal(12, rank)) if rank else (None, None)
    down = Projection(normal(12, 20) / 4, normal(12), a, b, 0.7)
    return normal(31, 20).to(dtype), normal(31, 20).to(dtype), typed(down, dtype)


def outputs_and_gradients(gate: Tensor, up: Tensor, down: Projection, formula) -> list[Tensor]:
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = formula(gate, up, down)
    wanted = [gate, up, *(t for t in (down.lora_A, down.lora_B) if t is not None)]
    return [y.detach(), *torch.autograd.grad((y.double() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), wanted)]


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)])
def test_output_and_every_gradient_are_the_formula_s(dtype, limit, activation, rank):
    gate, up, down = draw(dtype, rank=rank)
    ours = outputs_and_gradients(gate, up, down, lambda g, u, d: gated_low_rank(g, u, activation, d))
    exact = outputs_and_gradients(
        gate.double(), up.double(), in_float64(down), lambda g, u, d: plain(PLAIN[activation](g) * u, d)
    )
    assert max(differences(ours, exact)) < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)])
def test_with_dropout_too(dtype, limit, monkeypatch):
    masks = recorded_masks(monkeypatch)
    gate, up, down = draw(dtype)
    down = replace(down, dropout=0.3)
    ours = outputs_and_gradients(gate, up, down, lambda g, u, d: gated_low_rank(g, u, "silu", d))
    (mask,) = masks
    doubled = replace(in_float64(down), dropout=0.3)
    found = [
        max(differences(ours, outputs_and_gradients(gate.double(), up.double(), doubled, formula)))
        for formula in (lambda g, u, d: plain(F.silu(g) * u, d, mask), lambda g, u, d: plain(F.silu(g) * u, d))
    ]
    assert found[0] < limit
    assert found[1] > 0.05  # the control: without the draw


def test_the_activations_are_not_one_another():
    points = torch.linspace(-3, 3, 50)
    silu, gelu, tanh = (act(points) for act, _ in ACTIVATIONS.values())
    assert (silu - gelu).abs().max() > 0.1
    assert (gelu - tanh).abs().max() > 1e-4


def test_gate_and_up_alone_are_kept_of_the_wide_activations():
    gate, up, down = draw(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated_low_rank(gate.requires_grad_(), up.requires_grad_(), "silu", down)
    wide = [t for t in saved if t.shape == gate.shape]
    assert [t.data_ptr() for t in wide] == [gate.data_ptr(), up.data_ptr()]
