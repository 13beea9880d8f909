"""Frozen linear layers with low-rank updates, several of one input at a time.

    y_i = g_i (W_i x + s_i B_i A_i x) + b_i        arXiv:2106.09685, eq. 3; with a gain g arXiv:2402.09353, eq. 5

One autograd node for all of them. What it saves for the backward pass is x, the R-sized A x, the small matrices,
the outputs of those that have a gain, and a byte for each number that dropout decides about; the frozen weights get no
gradient work, the A's are stacked into one product, and every sum is accumulated inside a matrix product.

With dropout A_i sees drop_i(x), each its own draw. The factor 1 / (1 - p) goes to the small matrix instead of x.

Shape suffixes: N tokens, I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_cli.ops.dropout import draw_mask, masked, scale_of

Unpack = Callable[[Tensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class Projection:
    """One frozen linear layer and, unless it is left as it is, its update."""

    weight: Tensor  # (O, I), frozen; or what ``unpack`` makes it of
    bias: Tensor | None = None  # (O,), frozen
    lora_A: Tensor | None = None  # (R, I)
    lora_B: Tensor | None = None  # (O, R)
    scaling: float = 1.0
    gain: Tensor | None = None  # (O,) in the wide type: what DoRA multiplies each output feature with
    unpack: Unpack | None = None  # (packed weight, dtype) -> (O, I): of a quantized one, made anew for each product
    dropout: float = 0.0  # on the input of A

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.lora_A, self.lora_B, self.gain


TENSORS = 5  # of a projection


class Fixed(NamedTuple):
    """What a projection has beside its tensors."""

    scaling: float
    unpack: Unpack | None
    dropout: float


def low_rank_linear(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Every projection of x (..., I), in x's dtype: (..., O_1), (..., O_2) and so on.

    A's and B's of another dtype are rounded to x's for the products; their gradients come back in their own.
    """
    fixed = [Fixed(p.scaling, p.unpack, p.dropout) for p in projections]
    outputs = _LowRankLinear.apply(
        x.reshape(-1, x.shape[-1]), fixed, *(tensor for p in projections for tensor in p.tensors)
    )
    return tuple(y_NO.reshape(*x.shape[:-1], y_NO.shape[-1]) for y_NO in outputs)


def dense(weight: Tensor, unpack: Unpack | None, dtype: torch.dtype) -> Tensor:
    """(O, I) in the dtype of the product it is wanted for."""
    return weight if unpack is None else unpack(weight, dtype)


def project(
    x_NI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    z_NR: Tensor | None,
    b_OR: Tensor | None,
    gain_O: Tensor | None,
) -> Tensor:
    """(N, O): g (x W^T + z B^T) + b, accumulated inside the products; B is scaled already.

    As g (x W^T + b) + b (1 - g), so that a gain of 1 leaves the base's own output bit for bit.
    """
    y_NO = F.linear(x_NI, weight_OI, bias_O)
    if z_NR is not None and b_OR is not None:
        y_NO.addmm_(z_NR, b_OR.T)
    if gain_O is not None:
        y_NO.addcmul_(y_NO, _above_one(gain_O, y_NO.dtype))
        if bias_O is not None:
            y_NO.add_((bias_O * (1 - gain_O)).to(y_NO.dtype))
    return y_NO


def through_gain(dy_NO: Tensor, y_NO: Tensor, bias_O: Tensor | None, gain_O: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of what the gain was multiplied with (N, O), and of the gain (O,).

    The former output is (y - b) / g, so that nothing more needs to be saved; of a gain that is exactly 0 the gradient
    counts as 0.
    """
    before_NO = y_NO if bias_O is None else y_NO - bias_O
    along_O = (dy_NO * before_NO).sum(0, dtype=gain_O.dtype)
    before_gain = torch.addcmul(dy_NO, dy_NO, _above_one(gain_O, dy_NO.dtype))
    return before_gain, torch.where(gain_O == 0, 0, along_O / gain_O)


def _above_one(gain_O: Tensor, dtype: torch.dtype) -> Tensor:
    """g - 1 in the product's dtype, for y + y (g - 1): g itself would lose in bfloat16 what it learns."""
    return (gain_O - 1).to(dtype)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, fixed: list[Fixed], *tensors: Any) -> tuple[Tensor, ...]:
        groups = [tensors[i : i + TENSORS] for i in range(0, len(tensors), TENSORS)]
        adapted, masks = [], []
        for (_, _, a_RI, _, _), (_, _, share) in zip(groups, fixed, strict=True):
            if a_RI is not None:
                cast_A, mask_NI = drawn(a_RI, x_NI, share)
                adapted.append(cast_A)
                masks.append(mask_NI)
        stacked_A = torch.cat(adapted) if len(adapted) > 1 else adapted[0] if adapted else None
        z_NR = _through_a(x_NI, adapted, stacked_A, masks) if stacked_A is not None else None
        outputs, scaled_Bs, start = [], [], 0
        for (weight, bias_O, a_RI, b_OR, gain_O), (scaling, unpack, _) in zip(groups, fixed, strict=True):
            z = scaled_B = None
            if a_RI is not None and z_NR is not None:
                z = z_NR[:, start : start + a_RI.shape[0]]
                scaled_B = (b_OR * scaling).to(x_NI.dtype)
                start += a_RI.shape[0]
            outputs.append(project(x_NI, dense(weight, unpack, x_NI.dtype), bias_O, z, scaled_B, gain_O))
            scaled_Bs.append(scaled_B)
        ctx.fixed, ctx.ranks = fixed, [0 if group[2] is None else group[2].shape[0] for group in groups]
        ctx.dtypes = [None if group[3] is None else group[3].dtype for group in groups]
        kept = [
            (weight, scaled_B, *((y_NO, bias_O, gain_O) if gain_O is not None else (None, None, None)))
            for (weight, bias_O, _, _, gain_O), scaled_B, y_NO in zip(groups, scaled_Bs, outputs, strict=True)
        ]
        ctx.set_materialize_grads(False)  # an output that nothing used has no gradient, rather than zeros
        ctx.num_masks = len(masks)
        ctx.save_for_backward(x_NI, z_NR, stacked_A, *masks, *(tensor for group in kept for tensor in group))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x_NI, z_NR, stacked_A, *kept = ctx.saved_tensors
        masks, kept = kept[: ctx.num_masks], kept[ctx.num_masks :]
        groups = [kept[i : i + 5] for i in range(0, len(kept), 5)]
        before_gain, results = _before_gain(gradients, groups)
        dx_NI = _input_gradient(before_gain, groups, ctx.fixed) if ctx.needs_input_grad[0] else None
        g_parts, start = [], 0
        for number, (dy_NO, (_, scaled_B, *_)) in enumerate(zip(before_gain, groups, strict=True)):
            rank = ctx.ranks[number]
            if not rank:
                continue
            z = z_NR[:, start : start + rank]
            start += rank
            if dy_NO is None:  # an output that nothing used
                g_parts.append(z.new_zeros(z.shape))
                continue
            g_parts.append(dy_NO @ scaled_B)  # (N, R), scaled already
            results[number][3] = (dy_NO.T @ z).to(ctx.dtypes[number]).mul_(ctx.fixed[number].scaling)
        if g_parts:
            _place_gradients_of_stack(results, _through_a_backward(g_parts, x_NI, stacked_A, masks, dx_NI), ctx)
        return (dx_NI, None, *(gradient for group in results for gradient in group))


def _through_a(x_NI: Tensor, parts: list[Tensor], stacked_A: Tensor, masks: list[Tensor | None]) -> Tensor:
    """(N, R): every A of what it sees of x; one product where all see the same."""
    if not any(mask is not None for mask in masks):
        return x_NI @ stacked_A.T
    return torch.cat([seen(x_NI, mask) @ a_RI.T for a_RI, mask in zip(parts, masks, strict=True)], 1)


def _through_a_backward(
    g_parts: list[Tensor], x_NI: Tensor, stacked_A: Tensor, masks: list[Tensor | None], dx_NI: Tensor | None
) -> Tensor:
    """The gradient of the stack (R, I); adds to the input's, where that is wanted."""
    if not any(mask is not None for mask in masks):
        g_NR = torch.cat(g_parts, 1) if len(g_parts) > 1 else g_parts[0]
        if dx_NI is not None:
            dx_NI.addmm_(g_NR, stacked_A)
        return g_NR.T @ x_NI
    parts = stacked_A.split([g_NR.shape[1] for g_NR in g_parts])
    if dx_NI is not None:
        for g_NR, a_RI, mask in zip(g_parts, parts, masks, strict=True):
            add_through_a(dx_NI, g_NR, a_RI, mask)
    return torch.cat([g_NR.T @ seen(x_NI, mask) for g_NR, mask in zip(g_parts, masks, strict=True)])


def drawn(a_RI: Tensor, x_NI: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
    """A in the type of the product, with dropout's factor; and which numbers of x it sees, unless it sees all."""
    if not share:
        return a_RI.to(x_NI.dtype), None
    return (a_RI * scale_of(share)).to(x_NI.dtype), draw_mask(x_NI.shape, share, x_NI.device)


def seen(x_NI: Tensor, mask_NI: Tensor | None) -> Tensor:
    """What is left of x for an A; without the factor 1 / (1 - p), which A has."""
    return x_NI if mask_NI is None else masked(x_NI, mask_NI)


def add_through_a(dx_NI: Tensor, g_NR: Tensor, a_RI: Tensor, mask_NI: Tensor | None) -> None:
    """Add in place what comes back through an A and what it saw."""
    if mask_NI is None:
        dx_NI.addmm_(g_NR, a_RI)
    else:
        dx_NI.add_(masked(g_NR @ a_RI, mask_NI))


def _before_gain(
    gradients: Sequence[Tensor | None], groups: Sequence[Sequence[Tensor | None]]
) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
    """What comes back through each projection's gain; and the gradients to return, with those of the gains in place."""
    before, results = [], []
    for dy_NO, (_, _, y_NO, bias_O, gain_O) in zip(gradients, groups, strict=True):
        dgain_O = None
        if dy_NO is not None and gain_O is not None and y_NO is not None:
            dy_NO, dgain_O = through_gain(dy_NO, y_NO, bias_O, gain_O)
        before.append(dy_NO)
        results.append([None, None, None, None, dgain_O])
    return before, results


def _input_gradient(
    gradients: Sequence[Tensor | None], groups: Sequence[Sequence[Any]], fixed: Sequence[Fixed]
) -> Tensor:
    """sum_i dy_i W_i, accumulated inside the products. (N, I)"""
    dx_NI: Tensor | None = None
    for dy_NO, (weight, *_), (_, unpack, _) in zip(gradients, groups, fixed, strict=True):
        if dy_NO is not None:
            weight_OI = dense(weight, unpack, dy_NO.dtype)
            dx_NI = dy_NO @ weight_OI if dx_NI is None else dx_NI.addmm_(dy_NO, weight_OI)
    assert dx_NI is not None
    return dx_NI


def _place_gradients_of_stack(results: list[list[Tensor | None]], stacked_RI: Tensor, ctx: Any) -> None:
    """Cut the gradient of the stacked A's apart, each to its projection; there is none where B got none."""
    start = 0
    for result, rank, dtype, fixed in zip(results, ctx.ranks, ctx.dtypes, ctx.fixed, strict=True):
        if result[3] is not None:
            gradient_RI = stacked_RI[start : start + rank].to(dtype)
            result[2] = gradient_RI * scale_of(fixed.dropout) if fixed.dropout else gradient_RI
        start += rank
