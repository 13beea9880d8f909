"""Cross-entropy over supervised positions only, in float32, as a sum: micro-batches add up exactly.

With the output head it is one operation, so that logits never exist as a whole: for a few positions at a time
they are made, turned into the loss and into their own gradient, and forgotten.

Shape suffixes: M supervised positions, C those of one chunk, V vocabulary, D hidden size, T words with other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_cli.ops.kernels import Kernels, kernel
from lora_cli.ops.precision import wide, wide_type

# Logits made at a time: enough for a fast product, and few in memory. Measured with 49,152 words on the CPU:
# a third of them, 85 positions, takes a quarter longer; more of them gain nothing in bfloat16.
CHUNK_LOGITS = {"cpu": 3 * 2**22, "cuda": 2**26}
# Of those, how many are widened to float32 at a time: few enough for the CPU's cache, which takes a third less time.
WIDE_LOGITS = {"cpu": 2**21, "cuda": 2**26}


def wide_positions(vocabulary: int, device_type: str) -> int:
    """Positions whose loss is computed together."""
    return max(1, WIDE_LOGITS.get(device_type, WIDE_LOGITS["cpu"]) // vocabulary)


def positions_at_a_time(vocabulary: int, device_type: str) -> int:
    """Positions whose logits are made together."""
    size = CHUNK_LOGITS.get(device_type, CHUNK_LOGITS["cpu"]) // vocabulary
    return max(1, size if size < 16 else size // 16 * 16)  # products like even sizes


def summed_cross_entropy(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
    """sum_m -log softmax(logits_m)[target_m], in nats, float32."""
    return F.cross_entropy(wide(logits_MV), targets_M, reduction="sum")


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: softcap * tanh(scale * (h W^T + b) / softcap), or without the cap.

    W is the weight with the rows ``rows_TD`` in the places ``ids_T``, where there are any.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0  # Cohere multiplies logits, Granite divides them
    softcap: float | None = None  # Gemma 2, arXiv:2408.00118
    ids_T: Tensor | None = None
    rows_TD: Tensor | None = None
    kernels: Kernels = Kernels.PLAIN  # of the loss's element-wise work

    def linear(self, hidden_MD: Tensor) -> Tensor:
        """h W^T + b, (M, V)"""
        linear_MV = F.linear(hidden_MD, self.weight, self.bias)
        if self.ids_T is None or self.rows_TD is None:
            return linear_MV
        bias_T = None if self.bias is None else self.bias[self.ids_T]
        linear_MV[:, self.ids_T] = F.linear(hidden_MD, self.rows_TD.to(hidden_MD.dtype), bias_T)
        return linear_MV

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """(M, V) in the weight's dtype, as the model's own code gives them."""
        logits_MV = self.linear(hidden_MD.to(self.weight.dtype))
        if self.scale != 1.0:
            logits_MV = logits_MV * self.scale
        return logits_MV if self.softcap is None else self.softcap * torch.tanh(logits_MV / self.softcap)

    def chunks(self, hidden_MD: Tensor) -> Iterator[slice]:
        """Stretches of positions whose logits are made together."""
        size = positions_at_a_time(self.weight.shape[0], hidden_MD.device.type)
        return (slice(start, start + size) for start in range(0, len(hidden_MD), size))


def head_loss(hidden_MD: Tensor, head: Head, targets_M: Tensor) -> Tensor:
    """The summed cross-entropy of the head's logits, float32, without ever holding all of them."""
    hidden_MD = hidden_MD.to(head.weight.dtype)
    parameters = (head.weight, head.bias, head.ids_T, head.rows_TD)
    return _HeadLoss.apply(hidden_MD, targets_M, head.scale, head.softcap, head.kernels, *parameters)


class _HeadLoss(torch.autograd.Function):
    """Forward and backward in one pass: the gradient of a sum is known before anyone asks for it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        targets_M: Tensor,
        scale: float,
        softcap: float | None,
        kernels: Kernels,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_T: Tensor | None,
        rows_TD: Tensor | None,
    ) -> Tensor:
        head = Head(weight_VD, bias_V, scale, softcap, ids_T, rows_TD, kernels)
        needs_hidden, *_, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        loss = torch.zeros((), dtype=wide_type(hidden_MD.dtype), device=hidden_MD.device)
        dhidden_MD = torch.empty_like(hidden_MD) if needs_hidden else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide_type(weight_VD.dtype)) if needs_weight else None
        dbias_V = torch.zeros_like(bias_V, dtype=wide_type(bias_V.dtype)) if needs_bias and bias_V is not None else None
        drows_TD = None if rows_TD is None else torch.zeros_like(rows_TD, dtype=wide_type(rows_TD.dtype))
        for chunk in head.chunks(hidden_MD):
            linear_CV = head.linear(hidden_MD[chunk])
            loss += loss_and_gradient(linear_CV, targets_M[chunk], head)
            dlinear_CV = linear_CV  # what it has become in place
            if dbias_V is not None:
                dbias_V += dlinear_CV.sum(0, dtype=dbias_V.dtype)
            through_CD = None if drows_TD is None else _take_rows(dlinear_CV, hidden_MD[chunk], head, drows_TD)
            if dhidden_MD is not None:
                dhidden_MD[chunk] = dlinear_CV @ weight_VD + (0 if through_CD is None else through_CD)
            if dweight_VD is not None:
                dweight_VD += dlinear_CV.T @ hidden_MD[chunk]
        ctx.weight_dtype = weight_VD.dtype
        ctx.save_for_backward(dhidden_MD, dweight_VD, dbias_V, drows_TD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        *parts, drows_TD = ctx.saved_tensors
        dhidden, dweight, dbias = (None if d is None else (d * gradient).to(ctx.weight_dtype) for d in parts)
        drows = None if drows_TD is None else drows_TD * gradient
        return dhidden, None, None, None, None, dweight, dbias, None, drows


def _take_rows(dlinear_CV: Tensor, hidden_CD: Tensor, head: Head, drows_TD: Tensor) -> Tensor:
    """Take the part of the words with other rows out of the logits' gradient: what is left is the weight's.

    Adds to the rows' gradient, and returns what goes through them to the states (C, D).
    """
    assert head.ids_T is not None and head.rows_TD is not None
    dlinear_CT = dlinear_CV[:, head.ids_T]
    dlinear_CV[:, head.ids_T] = 0
    drows_TD += dlinear_CT.T @ hidden_CD
    return dlinear_CT @ head.rows_TD.to(dlinear_CT.dtype)


def loss_and_gradient(linear_CV: Tensor, targets_C: Tensor, head: Head) -> Tensor:
    """The summed loss in float32; ``linear_CV`` becomes the loss's gradient by itself."""
    size = wide_positions(linear_CV.shape[1], linear_CV.device.type)
    formula = kernel(_losses_and_gradient, head.kernels)
    each = zip(linear_CV.split(size), targets_C.split(size), strict=True)
    return torch.cat([formula(some, targets, head.scale, head.softcap) for some, targets in each]).sum()


def _losses_and_gradient(linear_CV: Tensor, targets_C: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Each position's loss (C,).

    d(-log softmax(z)[t]) / dz = softmax(z) - onehot(t); the cap's own derivative is 1 - tanh^2.
    """
    z_CV = wide(linear_CV)  # itself, where it is float32 already
    tanh_CV = None
    if softcap is not None:
        tanh_CV = z_CV.mul_(scale / softcap).tanh_()
        z_CV = tanh_CV * softcap
    elif scale != 1.0:
        z_CV.mul_(scale)
    z_CV.sub_(z_CV.amax(-1, keepdim=True))
    at_targets_C1 = z_CV.gather(1, targets_C[:, None])
    sums_C1 = z_CV.exp_().sum(-1, keepdim=True)
    losses_C = (sums_C1.log() - at_targets_C1).squeeze(1)
    p_CV = z_CV.div_(sums_C1)
    p_CV.scatter_add_(1, targets_C[:, None], torch.full_like(at_targets_C1, -1.0))
    if scale != 1.0:
        p_CV.mul_(scale)
    if tanh_CV is not None:
        p_CV.mul_(1 - tanh_CV.square_())
    linear_CV.copy_(p_CV)
    return losses_C


@torch.no_grad()
def head_statistics(hidden_MD: Tensor, head: Head, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """(the summed loss in float32, (M,) bool: the target has the largest logit), a few positions at a time."""
    loss = torch.zeros((), dtype=wide_type(hidden_MD.dtype), device=hidden_MD.device)
    right = []
    for chunk in head.chunks(hidden_MD):
        logits_CV = head.logits(hidden_MD[chunk])
        right.append(logits_CV.argmax(-1) == targets_M[chunk])
        loss += summed_cross_entropy(logits_CV, targets_M[chunk])
    return loss, torch.cat(right)
