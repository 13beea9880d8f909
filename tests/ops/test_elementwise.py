"""RMSNorm and rotary positions against their formulas in float64, and against transformers' own code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from lora_cli.ops.elementwise import _rotated, _rotated_by_halves, rms_norm, rotate


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output_and_gradient(x: Tensor, formula) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = formula(x)
    (dx,) = torch.autograd.grad((y.double() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), x)
    return y.detach(), dx


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_rms_norm_and_its_gradient_are_the_formula_s(dtype, limit, offset):
    x, weight = (normal(5, 7, 48) * 3).to(dtype), normal(48, seed=1).to(dtype)
    ours = output_and_gradient(x, lambda x: rms_norm(x, weight, 1e-3, offset))
    w = offset + weight.double()
    exact = output_and_gradient(x.double(), lambda x: w * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3))
    assert ours[0].dtype == dtype
    assert max(map(relative, ours, exact)) < limit


def test_rms_norm_is_no_less_exact_than_llama_s():
    x, norm = (normal(64, 48) * 3).bfloat16(), LlamaRMSNorm(48, eps=1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(normal(48, seed=1))
    w = norm.weight.detach()
    exact = output_and_gradient(
        x.double(), lambda x: w.double() * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    )
    ours = output_and_gradient(x, lambda x: rms_norm(x, w, 1e-5))
    theirs = output_and_gradient(x, norm)
    assert sum(map(relative, ours, exact)) <= sum(map(relative, theirs, exact))


def test_rms_norm_leaves_its_input_alone():
    x = normal(4, 8).float()
    before = x.clone()
    output_and_gradient(x, lambda x: rms_norm(x, torch.ones(8), 1e-5))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_rotation_and_its_gradient_are_llama_s(dtype, limit):
    x, angles = normal(9, 3, 16).to(dtype), normal(9, 8, seed=2) * 6
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))
    ours = output_and_gradient(x, lambda x: rotate(x, cos, sin))

    def llama(x: Tensor) -> Tensor:
        x_1HND = x[None].transpose(1, 2)
        return apply_rotary_pos_emb(x_1HND, x_1HND, cos[None].double(), sin[None].double())[0][0].transpose(0, 1)

    exact = output_and_gradient(x.double(), llama)
    assert max(map(relative, ours, exact)) < limit
    assert relative(x, exact[0]) > 0.1, "it does turn"


def test_a_rotation_keeps_lengths():
    x, angles = normal(9, 3, 16), normal(9, 8, seed=2) * 6
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("direction", [1, -1])
def test_a_compiler_is_given_the_same_rotation(direction):
    x, angles = normal(9, 3, 16), normal(9, 8, seed=2) * 6
    cos, sin = (torch.cat([f(angles)] * 2, -1).unsqueeze(-2) for f in (torch.cos, torch.sin))
    plain, halves = (formula(x, cos, sin, direction) for formula in (_rotated, _rotated_by_halves))
    torch.testing.assert_close(halves, plain, rtol=1e-14, atol=1e-14)
    assert relative(_rotated(x, cos, sin, -direction), plain) > 0.1, "the other way is another one"
