"""Frozen linear layers with low-rank updates, several of one input at a time.

    y_i = W_i x + b_i + s_i B_i A_i x          arXiv:2106.09685, eq. 3

One autograd node for all of them. What it saves for the backward pass is x, the R-sized A x, and the small
matrices; the frozen weights get no gradient work, the A's are stacked into one product, and every sum is
accumulated inside a matrix product.

Shape suffixes: N tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class Projection:
    """One frozen linear layer and, unless it is left as it is, its update."""

    weight: Tensor  # (O, I), frozen
    bias: Tensor | None = None  # (O,), frozen
    lora_A: Tensor | None = None  # (R, I)
    lora_B: Tensor | None = None  # (O, R)
    scaling: float = 1.0


def low_rank_linear(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Every projection of x (..., I), in x's dtype: (..., O_1), (..., O_2) and so on.

    A's and B's of another dtype are rounded to x's for the products; their gradients come back in their own.
    """
    tensors = [t for p in projections for t in (p.weight, p.bias, p.lora_A, p.lora_B)]
    outputs = _LowRankLinear.apply(x.reshape(-1, x.shape[-1]), [p.scaling for p in projections], *tensors)
    return tuple(y_NO.reshape(*x.shape[:-1], y_NO.shape[-1]) for y_NO in outputs)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, scalings: list[float], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        groups = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        adapted = [a_RI.to(x_NI.dtype) for _, _, a_RI, _ in groups if a_RI is not None]
        stacked_A = torch.cat(adapted) if len(adapted) > 1 else adapted[0] if adapted else None
        z_NR = x_NI @ stacked_A.T if stacked_A is not None else None
        outputs, scaled_Bs, start = [], [], 0
        for (weight_OI, bias_O, a_RI, b_OR), scaling in zip(groups, scalings, strict=True):
            assert weight_OI is not None
            y_NO = F.linear(x_NI, weight_OI, bias_O)
            if a_RI is not None and b_OR is not None and z_NR is not None:
                end = start + a_RI.shape[0]
                scaled_Bs.append((b_OR * scaling).to(x_NI.dtype))
                y_NO.addmm_(z_NR[:, start:end], scaled_Bs[-1].T)
                start = end
            outputs.append(y_NO)
        ctx.scalings, ctx.ranks = scalings, [0 if a is None else a.shape[0] for _, _, a, _ in groups]
        ctx.dtypes = [None if b is None else b.dtype for _, _, _, b in groups]
        ctx.save_for_backward(x_NI, z_NR, stacked_A, *[group[0] for group in groups], *scaled_Bs)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x_NI, z_NR, stacked_A, *rest = ctx.saved_tensors
        count = len(ctx.ranks)
        weights, scaled_Bs = rest[:count], iter(rest[count:])
        dx_NI = _input_gradient(gradients, weights) if ctx.needs_input_grad[0] else None
        results: list[Any] = []
        g_parts, start = [], 0
        for dy_NO, rank, scaling, dtype in zip(gradients, ctx.ranks, ctx.scalings, ctx.dtypes, strict=True):
            if not rank:
                results += [None] * 4
                continue
            b_OR, z = next(scaled_Bs), z_NR[:, start : start + rank]
            start += rank
            if dy_NO is None:  # an output that nothing used
                g_parts.append(z.new_zeros(z.shape))
                results += [None] * 4
                continue
            g_parts.append(dy_NO @ b_OR)  # (N, R), scaled already
            results += [None, None, None, (dy_NO.T @ z).to(dtype).mul_(scaling)]
        if g_parts:
            g_NR = torch.cat(g_parts, 1) if len(g_parts) > 1 else g_parts[0]
            _place_gradients_of_stack(results, g_NR.T @ x_NI, ctx)
            if dx_NI is not None:
                dx_NI.addmm_(g_NR, stacked_A)
        return (dx_NI, None, *results)


def _input_gradient(gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """sum_i dy_i W_i, accumulated inside the products. (N, I)"""
    pairs = [(dy_NO, weight_OI) for dy_NO, weight_OI in zip(gradients, weights, strict=True) if dy_NO is not None]
    dx_NI = pairs[0][0] @ pairs[0][1]
    for dy_NO, weight_OI in pairs[1:]:
        dx_NI.addmm_(dy_NO, weight_OI)
    return dx_NI


def _place_gradients_of_stack(results: list[Any], stacked_RI: Tensor, ctx: Any) -> None:
    """Cut the gradient of the stacked A's apart, into the third of each projection's four slots."""
    start = 0
    for number, (rank, dtype) in enumerate(zip(ctx.ranks, ctx.dtypes, strict=True)):
        if rank and results[4 * number + 3] is not None:
            results[4 * number + 2] = stacked_RI[start : start + rank].to(dtype)
        start += rank
