"""The element-wise work between matrix products: RMSNorm and rotary positions.

Each is one autograd node that saves its inputs alone, computes in float32 inside, and rounds once. The formulas
run as they stand, or as single ``kernels``.

Shape suffixes: N tokens, D features, H heads; `...` any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_cli.ops.kernels import Kernels, kernel
from lora_cli.ops.precision import wide

PLAIN = Kernels.PLAIN


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, *, kernels: Kernels = PLAIN) -> Tensor:
    """(offset + w) x / sqrt(mean(x^2) + eps), in x's dtype.  arXiv:1910.07467, eq. 4; Gemma's offset is 1."""
    return _RMSNorm.apply(x, weight_D, eps, offset, kernels)


def _rms_norm_forward(x: Tensor, weight_D: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    x_wide = wide(x)  # once: operations on two types would each convert for themselves
    length = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
    rstd = torch.rsqrt(length.square() / x.shape[-1] + eps)
    return (x_wide * rstd).mul_(offset + wide(weight_D)).to(x.dtype), rstd


def _rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight_D: Tensor, offset: float) -> Tensor:
    """dx = r (g - x r^2 mean(g x)) with g = dy w."""
    g, x_wide = wide(dy) * (offset + wide(weight_D)), wide(x)
    along = (g * x_wide).mean(-1, keepdim=True).mul_(rstd.square())
    return g.addcmul_(x_wide, along, value=-1).mul_(rstd).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, offset: float, kernels: Kernels) -> Tensor:
        y, rstd = kernel(_rms_norm_forward, kernels)(x, weight_D, eps, offset)
        ctx.offset, ctx.kernels = offset, kernels
        ctx.save_for_backward(x, rstd, weight_D)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, rstd, weight_D = ctx.saved_tensors
        dx = kernel(_rms_norm_backward, ctx.kernels)(dy, x, rstd, weight_D, ctx.offset)
        return dx, None, None, None, None


def rotate(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor, *, kernels: Kernels = PLAIN) -> Tensor:
    """Rotary positions (arXiv:2104.09864, eq. 34) in the half-split form of Llama and GPT-NeoX.

    Pairs are (d, d + D/2); cos and sin hold each angle twice.
    """
    return _Rotate.apply(x_NHD, cos_ND.unsqueeze(-2), sin_ND.unsqueeze(-2), kernels)


def _rotated(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, direction: int) -> Tensor:
    half = x_NHD.shape[-1] // 2
    y_NHD = x_NHD * cos_N1D
    y_NHD[..., :half].addcmul_(x_NHD[..., half:], sin_N1D[..., :half], value=-direction)
    y_NHD[..., half:].addcmul_(x_NHD[..., :half], sin_N1D[..., half:], value=direction)
    return y_NHD


def _rotated_by_halves(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, direction: int) -> Tensor:
    """The same for a compiler, whose loops over stretches of its own output are three times slower on the CPU."""
    first, second = wide(x_NHD).chunk(2, -1)
    (cos_first, cos_second), (sin_first, sin_second) = cos_N1D.chunk(2, -1), (sin_N1D * direction).chunk(2, -1)
    halves = (first * cos_first - second * sin_first, second * cos_second + first * sin_second)
    return torch.cat(halves, -1).to(x_NHD.dtype)


def _turned(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, direction: int, kernels: Kernels) -> Tensor:
    formula = _rotated if kernels is PLAIN else _rotated_by_halves
    return kernel(formula, kernels)(x_NHD, cos_N1D, sin_N1D, direction)


class _Rotate(torch.autograd.Function):
    """The backward pass turns the other way, so nothing but the angles is saved."""

    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, kernels: Kernels) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(cos_N1D, sin_N1D)
        return _turned(x_NHD, cos_N1D, sin_N1D, 1, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NHD: Tensor) -> tuple[Any, ...]:
        cos_N1D, sin_N1D = ctx.saved_tensors
        return _turned(dy_NHD, cos_N1D, sin_N1D, -1, ctx.kernels), None, None, None
