"""A frozen linear layer with a trained low-rank update.

Shape suffixes: I in_features, O out_features, R rank; `...` any leading dimensions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_cli.ops.low_rank import Projection, low_rank_linear

LINEAR_TYPES = (nn.Linear, Conv1D)


def features(base: nn.Linear | Conv1D) -> tuple[int, int]:
    """(in_features, out_features); GPT-2's Conv1D stores its weight transposed."""
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    return base.in_features, base.out_features


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


class LoRALinear(nn.Module):
    """y = W x + b + s B A drop(x): W and b frozen, A (R, I) and B (O, R) trained.  arXiv:2106.09685, eq. 3

    A and B are float32 whatever the base is stored in; the products run in the dtype of the input, which is
    the base's. With B = 0 the output is the base's, bit for bit.
    """

    def __init__(self, base: nn.Linear | Conv1D, r: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        in_features, out_features = features(base)
        device = base.weight.device
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, dtype=torch.float32, device=device))
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x_I: Tensor) -> Tensor:
        projection = projection_of(self)
        if projection is not None:
            return low_rank_linear(x_I, [projection])[0]
        z_R = F.linear(self.dropout(x_I), self.lora_A.to(x_I.dtype))
        return self.base(x_I) + self.scaling * F.linear(z_R, self.lora_B.to(x_I.dtype))

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    # Model code that looks at a layer's weight (its dtype, its shape) finds the base's.
    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


def has_hooks(module: nn.Module) -> bool:
    """Whether something else takes part in a call of this module: its weight alone does not say what it does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def projection_of(module: nn.Module) -> Projection | None:
    """A frozen linear layer, with or without an adapter, as arithmetic; None where a call of it is more than that."""
    adapter = module if isinstance(module, LoRALinear) else None
    base: Any = module if adapter is None else adapter.base
    if type(base) not in LINEAR_TYPES or has_hooks(module) or has_hooks(base):
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    weight_OI = base.weight.T if isinstance(base, Conv1D) else base.weight
    if adapter is None:
        return Projection(weight_OI, base.bias)
    if not isinstance(adapter.dropout, nn.Identity):
        return None
    return Projection(weight_OI, base.bias, adapter.lora_A, adapter.lora_B, adapter.scaling)


def fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, transposed: bool) -> Tensor:
    """W + s B A in float32; the caller rounds once. ``transposed`` for weights stored (I, O)."""
    update_OI = scaling * (lora_B.float() @ lora_A.float())
    return weight.float() + (update_OI.T if transposed else update_OI)
