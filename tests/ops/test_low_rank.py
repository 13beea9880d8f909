"""Grouped low-rank projections against the plain formula in float64: outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_cli.ops import low_rank
from lora_cli.ops.dropout import draw_mask, scale_of
from lora_cli.ops.low_rank import Projection, low_rank_linear

N, I = 37, 24  # noqa: E741 -- in_features, as everywhere
OUTPUTS, RANKS, SCALES = (24, 8, 8, 40), (3, 0, 5, 1), (2.0, 1.0, 0.7, 1.0)


def draw(dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, list[Projection]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    projections = []
    for out, rank, scale in zip(OUTPUTS, RANKS, SCALES, strict=True):
        a, b = (normal(rank, I), normal(out, rank)) if rank else (None, None)
        projections.append(Projection(normal(out, I), normal(out) if bias else None, a, b, scale))
    return normal(N, I).to(dtype) * 5, [typed(p, dtype) for p in projections]


def typed(p: Projection, dtype: torch.dtype) -> Projection:
    """The base in ``dtype``, the adapter in float32 (float64 in float64), as in a model."""
    wide = torch.promote_types(dtype, torch.float32)
    trained = [None if t is None else t.to(wide).requires_grad_() for t in (p.lora_A, p.lora_B)]
    return Projection(p.weight.to(dtype), None if p.bias is None else p.bias.to(dtype), *trained, p.scaling)


def plain(x: Tensor, p: Projection, mask: Tensor | None = None) -> Tensor:
    y = x @ p.weight.T + (0 if p.bias is None else p.bias)
    seen = x if mask is None else x * mask * scale_of(p.dropout)
    return y if p.lora_A is None else y + p.scaling * (seen @ p.lora_A.to(x.dtype).T @ p.lora_B.to(x.dtype).T)


def outputs_and_gradients(x: Tensor, projections: list[Projection], formula) -> list[Tensor]:
    x = x.detach().requires_grad_()
    outputs = formula(x, projections)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)).sum()
        for y in outputs
    )
    wanted = [x, *(t for p in projections for t in (p.lora_A, p.lora_B) if t is not None)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, wanted)]


def differences(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, exact, strict=True)]


def in_float64(p: Projection) -> Projection:
    doubled = [None if t is None else t.detach().double() for t in (p.weight, p.bias, p.lora_A, p.lora_B)]
    for t in doubled[2:]:
        if t is not None:
            t.requires_grad_()
    return Projection(*doubled, p.scaling)


def plainly(x: Tensor, projections: list[Projection]) -> list[Tensor]:
    return [plain(x, p) for p in projections]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_outputs_and_every_gradient_are_the_formula_s(dtype, limit, bias):
    x, projections = draw(dtype, bias=bias)
    ours = outputs_and_gradients(x, projections, low_rank_linear)
    exact = outputs_and_gradients(x.double(), [in_float64(p) for p in projections], plainly)
    assert max(differences(ours, exact)) < limit


@pytest.mark.parametrize("shares", [(0.3, 0.3, 0.3, 0.3), (0.0, 0.5, 0.2, 0.0)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)])
def test_with_dropout_too_each_a_sees_a_draw_of_its_own(dtype, limit, shares, monkeypatch):
    """Against the formula on what was drawn; the frozen part sees everything."""
    masks = recorded_masks(monkeypatch)
    x, projections = draw(dtype, bias=True)
    projections = [replace(p, dropout=share) for p, share in zip(projections, shares, strict=True)]
    ours = outputs_and_gradients(x, projections, low_rank_linear)
    drawn = iter(masks)
    of_each = [
        next(drawn) if share and p.lora_A is not None else None for p, share in zip(projections, shares, strict=True)
    ]
    assert next(drawn, None) is None
    assert not torch.equal(masks[0], masks[-1]) or len(masks) == 1

    def plainly_dropped(x: Tensor, projections: list[Projection]) -> list[Tensor]:
        return [plain(x, p, mask) for p, mask in zip(projections, of_each, strict=True)]

    exact = [replace(in_float64(p), dropout=p.dropout) for p in projections]
    assert max(differences(ours, outputs_and_gradients(x.double(), exact, plainly_dropped))) < limit
    assert max(differences(ours, outputs_and_gradients(x.double(), exact, plainly))) > 0.05  # the control


def recorded_masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every mask that is drawn from now on."""
    masks: list[Tensor] = []

    def recorded(*given: Any) -> Tensor:
        masks.append(draw_mask(*given))
        return masks[-1]

    monkeypatch.setattr(low_rank, "draw_mask", recorded)
    return masks


def test_in_bfloat16_it_is_no_less_exact_than_torch_s_own_way():
    x, projections = draw(torch.bfloat16, bias=True)
    exact = outputs_and_gradients(x.double(), [in_float64(p) for p in projections], plainly)
    ours = differences(outputs_and_gradients(x, projections, low_rank_linear), exact)
    theirs = differences(outputs_and_gradients(x, projections, plainly), exact)
    assert sum(ours) <= sum(theirs)


def test_an_output_that_nothing_uses_adds_nothing():
    x, projections = draw(torch.float64, bias=False)
    first = projections[0]
    x = x.requires_grad_()
    low_rank_linear(x, projections)[0].sum().backward()
    together = x.grad.clone()
    x.grad = None
    plain(x, first).sum().backward()
    torch.testing.assert_close(together, x.grad)
    assert float(projections[2].lora_A.grad.abs().max() if projections[2].lora_A.grad is not None else 0) == 0


def test_leading_dimensions_are_kept():
    x, projections = draw(torch.float64, bias=True)
    flat = low_rank_linear(x, projections)
    shaped = low_rank_linear(x.view(1, N, I), projections)
    one = low_rank_linear(x[0], projections)
    assert all(torch.equal(a, b[0]) for a, b in zip(flat, shaped, strict=True))
    assert all(a.shape == b[0].shape for a, b in zip(one, flat, strict=True))


def test_frozen_weights_get_no_gradient_and_only_what_is_needed_is_saved():
    x, projections = draw(torch.float32, bias=True)
    saved: list[Tensor] = []
    known = {t.data_ptr() for p in projections for t in (p.weight, p.bias, p.lora_A, p.lora_B) if t is not None}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = low_rank_linear(x.requires_grad_(), projections)
    sum(y.sum() for y in outputs).backward()
    assert all(p.weight.grad is None for p in projections)
    activations = [t for t in saved if t.data_ptr() not in known and t.shape[0] == N]
    assert sorted(t.shape[1] for t in activations) == sorted([sum(RANKS), I]), "x, and A x"


def test_without_an_input_that_needs_it_no_input_gradient_is_computed():
    x, projections = draw(torch.float32, bias=False)
    outputs = low_rank_linear(x, projections)
    assert all(y.requires_grad for y in outputs)
    sum(y.sum() for y in outputs).backward()
    assert x.grad is None
    assert projections[0].lora_A.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)])
def test_on_a_gpu_with_dropout_each_a_sees_a_draw_of_its_own(dtype, limit, monkeypatch):
    masks = recorded_masks(monkeypatch)
    x, projections = draw(dtype, bias=True)
    on_gpu = [
        Projection(
            *(None if t is None else t.detach().cuda().requires_grad_(t.requires_grad) for t in p.tensors[:4]), 0.7
        )
        for p in projections
    ]
    on_gpu = [replace(p, dropout=0.3) for p in on_gpu]
    ours = outputs_and_gradients(x.cuda(), on_gpu, low_rank_linear)
    drawn = iter([mask.cpu() for mask in masks])
    of_each = [next(drawn) if p.lora_A is not None else None for p in projections]
    exact = [replace(in_float64(p), dropout=0.3, scaling=0.7) for p in projections]
    expected = outputs_and_gradients(
        x.double(), exact, lambda x, ps: [plain(x, p, mask) for p, mask in zip(ps, of_each, strict=True)]
    )
    assert max(differences([t.cpu() for t in ours], expected)) < limit
