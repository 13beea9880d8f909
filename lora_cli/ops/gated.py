"""A gated activation and the projection behind it: the second half of SwiGLU and its kin.

    y = g (W h + s B A h) + b    with    h = act(gate) * up      arXiv:2002.05202, eq. 6

One autograd node that saves gate and up, and makes h again in the backward pass: the widest activations of a
transformer are then kept twice instead of four times.

Shape suffixes: N tokens, I inner features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_cli.ops.dropout import scale_of
from lora_cli.ops.kernels import Kernels, kernel
from lora_cli.ops.low_rank import Fixed, Projection, add_through_a, dense, drawn, project, seen, through_gain

Activation = Callable[[Tensor], Tensor]
Derivative = Callable[[Tensor, Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_backward(dy: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh")


# name -> act(x), and dy act'(x)
ACTIVATIONS: dict[str, tuple[Activation, Derivative]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_backward),
}


def gated_low_rank(
    gate: Tensor, up: Tensor, activation: str, down: Projection, *, kernels: Kernels = Kernels.PLAIN
) -> Tensor:
    """(..., O) from gate and up (..., I)."""
    gate_NI, up_NI = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    fixed = Fixed(down.scaling, down.unpack, down.dropout)
    y_NO = _GatedLowRank.apply(gate_NI, up_NI, activation, fixed, kernels, *down.tensors)
    return y_NO.reshape(*gate.shape[:-1], y_NO.shape[-1])


def _inner(gate_NI: Tensor, up_NI: Tensor, act: Activation) -> Tensor:
    return act(gate_NI).mul_(up_NI)


def _inner_backward(
    dh_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, act: Activation, derivative: Derivative
) -> tuple[Tensor, Tensor, Tensor]:
    """(h again, d gate, d up)."""
    activated_NI = act(gate_NI)
    return activated_NI * up_NI, derivative(dh_NI * up_NI, gate_NI), activated_NI.mul_(dh_NI)


class _GatedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate_NI: Tensor,
        up_NI: Tensor,
        activation: str,
        fixed: Fixed,
        kernels: Kernels,
        weight: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor | None,
        b_OR: Tensor | None,
        gain_O: Tensor | None,
    ) -> Tensor:
        h_NI = kernel(_inner, kernels)(gate_NI, up_NI, ACTIVATIONS[activation][0])
        z_NR = cast_A = scaled_B = mask_NI = None
        if a_RI is not None and b_OR is not None:
            cast_A, mask_NI = drawn(a_RI, h_NI, fixed.dropout)
            scaled_B = (b_OR * fixed.scaling).to(h_NI.dtype)
            z_NR = seen(h_NI, mask_NI) @ cast_A.T
        y_NO = project(h_NI, dense(weight, fixed.unpack, h_NI.dtype), bias_O, z_NR, scaled_B, gain_O)
        ctx.activation, ctx.fixed, ctx.kernels = activation, fixed, kernels
        ctx.dtype = None if b_OR is None else b_OR.dtype
        for_gain = (None, None, None) if gain_O is None else (y_NO, bias_O, gain_O)
        ctx.save_for_backward(gate_NI, up_NI, weight, z_NR, cast_A, scaled_B, mask_NI, *for_gain)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Any, ...]:
        gate_NI, up_NI, weight, z_NR, cast_A, scaled_B, mask_NI, y_NO, bias_O, gain_O = ctx.saved_tensors
        act, derivative = ACTIVATIONS[ctx.activation]
        da_RI = db_OR = dgain_O = None
        if gain_O is not None:
            dy_NO, dgain_O = through_gain(dy_NO, y_NO, bias_O, gain_O)
        dh_NI = dy_NO @ dense(weight, ctx.fixed.unpack, dy_NO.dtype)
        if scaled_B is not None:
            g_NR = dy_NO @ scaled_B
            add_through_a(dh_NI, g_NR, cast_A, mask_NI)
            db_OR = (dy_NO.T @ z_NR).to(ctx.dtype).mul_(ctx.fixed.scaling)
        h_NI, dgate_NI, dup_NI = kernel(_inner_backward, ctx.kernels)(dh_NI, gate_NI, up_NI, act, derivative)
        if scaled_B is not None:
            da_RI = (g_NR.T @ seen(h_NI, mask_NI)).to(ctx.dtype)
            if mask_NI is not None:
                da_RI *= scale_of(ctx.fixed.dropout)
        return dgate_NI, dup_NI, None, None, None, None, None, da_RI, db_OR, dgain_O
