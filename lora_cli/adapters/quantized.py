"""A frozen linear layer whose weight is stored in 4 or 8 bits, and computes in the type it was made from.

bitsandbytes' own layers are not used: where the CPU multiplies bfloat16, a forward pass of its 4-bit layer in
evaluation repacks the weight in place, and a later backward pass gives no gradient. Here a weight is only ever read.

Shape suffixes: I in_features, O out_features; `...` any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.ops.low_rank import Projection, low_rank_linear
from lora_cli.ops.packing import Packed, unpack


class QuantizedLinear(nn.Module):
    """y = W' x + b with W' as it is packed, in place of a dense layer.

    Only the weight is quantized, never what it is multiplied with; and it is unpacked anew for each product, forward
    and backward. GPT-2's transposed weights are stored as (O, I) too.
    """

    def __init__(self, base: nn.Linear | Conv1D, packed: Packed) -> None:
        super().__init__()
        self.transposed = isinstance(base, Conv1D)
        self.kind, self.dtype = packed.kind, packed.dtype
        self.out_features, self.in_features = packed.shape
        weight, *scales = packed.parts
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = base.bias
        self.scales = [f"scale_{number}" for number in range(len(scales))]
        for name, scale in zip(self.scales, scales, strict=True):
            self.register_buffer(name, scale, persistent=False)

    def forward(self, x_I: Tensor) -> Tensor:
        return low_rank_linear(x_I, [Projection(self.weight, self.bias, unpack=self.unpack)])[0]

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """(O, I): the weight that this layer stands for, whatever type it is wanted in."""
        parts = (packed, *(getattr(self, name) for name in self.scales))
        return unpack(parts, self.kind, (self.out_features, self.in_features), self.dtype).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind} of {self.dtype}"


def quantized(base: nn.Linear | Conv1D, kind: str) -> QuantizedLinear:
    """A dense layer packed: it computes with unpack(pack(W)), in the dtype that W had."""
    weight = base.weight.detach()
    return QuantizedLinear(base, Packed.of(weight.T if isinstance(base, Conv1D) else weight, kind))


@dataclass(frozen=True)
class Quantization:
    """How a run stored its base: which layers, packed how, and made from which type."""

    kind: str
    dtype: torch.dtype
    modules: frozenset[str]

    def seen(self, weight: Tensor, transposed: bool) -> Tensor:
        """What a layer with this weight, (O, I) or (I, O) if ``transposed``, computes with once it is packed."""
        weight_OI = (weight.T if transposed else weight).to(self.dtype)
        seen_OI = Packed.of(weight_OI, self.kind).weight()
        return seen_OI.T if transposed else seen_OI
