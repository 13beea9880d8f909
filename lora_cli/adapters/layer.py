"""A frozen linear layer with a trained low-rank update.

Shape suffixes: I in_features, O out_features, R rank; `...` any leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.quantized import QuantizedLinear
from lora_cli.ops.low_rank import Projection, Unpack, dense, low_rank_linear
from lora_cli.ops.row_norms import adapted_row_norms, row_squares

DENSE_TYPES = (nn.Linear, Conv1D)
LINEAR_TYPES = (*DENSE_TYPES, QuantizedLinear)
Base: TypeAlias = nn.Linear | Conv1D | QuantizedLinear
FACTORS = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude_vector"  # PEFT's name


def features(base: Base) -> tuple[int, int]:
    """(in_features, out_features); GPT-2's Conv1D stores its weight transposed."""
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    return base.in_features, base.out_features


def is_transposed(base: Any) -> bool:
    """Whether the model stores this layer's weight as (I, O)."""
    return isinstance(base, Conv1D) or (isinstance(base, QuantizedLinear) and base.transposed)


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


@dataclass(frozen=True)
class Parametrisation:
    """How an adapter makes its update, beside its rank and scale."""

    dropout: float = 0.0
    use_dora: bool = False
    has_start: bool = False  # the update counts from where A and B begin: s (B A - B_0 A_0)


PLAIN = Parametrisation()


class LoRALinear(nn.Module):
    """y = W x + b + s B A drop(x): W and b frozen, A (R, I) and B (O, R) trained.  arXiv:2106.09685, eq. 3

    A and B are float32 whatever the base is stored in; the products run in the dtype of the input, which is
    the base's. With B = 0 the output is the base's, bit for bit.

    With a start, B A stands for B A - B_0 A_0: initialisations that do not begin at zero (PiSSA and its kin) thus
    leave the base as it is, and what was trained is a plain adapter of rank 2 R.

    With a magnitude m (O,), DoRA (arXiv:2402.09353, eq. 5): y = g (W x + s B A drop(x)) + b with
    g = m / ||W + s B A|| by rows, and only m has a gradient through g.
    """

    def __init__(self, base: Base, r: int, scaling: float, form: Parametrisation = PLAIN) -> None:
        super().__init__()
        in_features, out_features = features(base)
        self.base = base
        self.scaling = scaling
        self.dropout = nn.Dropout(form.dropout) if form.dropout else nn.Identity()
        self._make_factors(r, in_features, out_features, form.has_start)
        self.lora_magnitude_vector: nn.Parameter | None = None
        if form.use_dora:
            squares_O = row_squares(dense(*weight_of(base), torch.float32))
            self.register_buffer("base_squares", squares_O, persistent=False)
            self.lora_magnitude_vector = nn.Parameter(squares_O.sqrt())

    def _make_factors(self, r: int, in_features: int, out_features: int, has_start: bool) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float32, device=self.base.weight.device)

        self.lora_A = nn.Parameter(zeros(r, in_features))
        self.lora_B = nn.Parameter(zeros(out_features, r))
        self.start_A: Tensor | None
        self.start_B: Tensor | None
        self.register_buffer("start_A", zeros(r, in_features) if has_start else None, persistent=False)
        self.register_buffer("start_B", zeros(out_features, r) if has_start else None, persistent=False)

    def forward(self, x_I: Tensor) -> Tensor:
        projection = projection_of(self)
        if projection is not None:
            return low_rank_linear(x_I, [projection])[0]
        a_RI, b_OR = self.factors()
        z_R = F.linear(self.dropout(x_I), a_RI.to(x_I.dtype))
        y_O = self.base(x_I) + self.scaling * F.linear(z_R, b_OR.to(x_I.dtype))
        gain_O = self.gain()
        if gain_O is None:
            return y_O
        bias_O = 0 if self.base.bias is None else self.base.bias
        return (y_O * gain_O + bias_O * (1 - gain_O)).to(y_O.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The A and B whose product is the update: with a start, [A; A_0] and [B, -B_0]."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], 1)

    def gain(self) -> Tensor | None:
        """(O,) m / ||W + s B A||; of a row of zeros the divisor is 1. None without magnitudes."""
        if self.lora_magnitude_vector is None:
            return None
        norms_O = self._row_norms()
        return self.lora_magnitude_vector / torch.where(norms_O == 0, 1, norms_O)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        weight_OI = dense(*weight_of(self.base), torch.float32)
        if self.start_A is not None:  # the small difference of two large products: not in bfloat16
            weight_OI = weight_OI.float()
        squares_O: Any = self.base_squares
        return adapted_row_norms(weight_OI, squares_O, *self.factors(), self.scaling)

    @torch.no_grad()
    def begin(self, a_RI: Tensor, b_OR: Tensor) -> None:
        """Start from these values; with a start, the update is zero here whatever they are."""
        if a_RI.shape != self.lora_A.shape:  # ranks were handed out anew
            self._make_factors(a_RI.shape[0], a_RI.shape[1], b_OR.shape[0], self.start_A is not None)
        self.lora_A.copy_(a_RI)
        self.lora_B.copy_(b_OR)
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(a_RI)
            self.start_B.copy_(b_OR)
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self._row_norms())

    def trained(self) -> dict[str, Tensor]:
        """What a file holds of this layer: the whole update, not what is left of it without the start."""
        a_RI, b_OR = self.factors()
        found = {"lora_A": a_RI, "lora_B": b_OR}
        return found if self.lora_magnitude_vector is None else found | {MAGNITUDE: self.lora_magnitude_vector}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``trained``. Ranks are the file's."""
        a_RI, b_OR = tensors["lora_A"], tensors["lora_B"]
        r = a_RI.shape[0] // 2 if self.start_A is not None else a_RI.shape[0]
        if r != self.r:
            self._make_factors(r, a_RI.shape[1], b_OR.shape[0], self.start_A is not None)
        self.lora_A.copy_(a_RI[:r])
        self.lora_B.copy_(b_OR[:, :r])
        if self.start_A is not None and self.start_B is not None:
            self.start_A.copy_(a_RI[r:])
            self.start_B.copy_(-b_OR[:, r:])
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(tensors[MAGNITUDE])

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    @property
    def file_rank(self) -> int:
        """The rank of the update as a file holds it."""
        return self.r if self.start_A is None else 2 * self.r

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


def weight_of(base: Any) -> tuple[Tensor, Unpack | None]:
    """A layer's weight (O, I), or what it is packed as and the way to unpack it."""
    if isinstance(base, QuantizedLinear):
        return base.weight, base.unpack
    return (base.weight.T if isinstance(base, Conv1D) else base.weight), None


def frozen_projection(base: Any) -> Projection | None:
    """A frozen linear layer as arithmetic; None where a call of it is more than that."""
    if type(base) not in LINEAR_TYPES or has_hooks(base):
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    weight, unpack = weight_of(base)
    return Projection(weight, base.bias, unpack=unpack)


def projection_of(module: nn.Module) -> Projection | None:
    """A frozen linear layer, with or without an adapter, as arithmetic; None where a call of it is more than that."""
    if not isinstance(module, LoRALinear):
        return frozen_projection(module)
    frozen = frozen_projection(module.base)
    share = _dropped_share(module.dropout)
    if frozen is None or has_hooks(module) or share is None:
        return None
    a_RI, b_OR = module.factors()
    return Projection(frozen.weight, frozen.bias, a_RI, b_OR, module.scaling, module.gain(), frozen.unpack, share)


def _dropped_share(dropout: nn.Module) -> float | None:
    """Of the numbers that go through it now; None where a call of it is more than that."""
    if has_hooks(dropout) or type(dropout) not in (nn.Identity, nn.Dropout):
        return None
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def fold(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, transposed: bool, magnitude_O: Tensor | None = None
) -> Tensor:
    """W + s B A in float32, with DoRA's magnitudes (O,) as its row norms; the caller rounds once.

    ``transposed`` for weights stored (I, O).
    """
    weight_OI = (weight.T if transposed else weight).float() + scaling * (lora_B.float() @ lora_A.float())
    if magnitude_O is not None:
        norms_O = torch.linalg.vector_norm(weight_OI, dim=1)
        weight_OI *= (magnitude_O.float() / torch.where(norms_O == 0, 1, norms_O))[:, None]
    return weight_OI.T if transposed else weight_OI
