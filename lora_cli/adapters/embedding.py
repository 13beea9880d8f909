"""A frozen embedding with a trained low-rank update.

Shape suffixes: V vocabulary, D hidden size, R rank; `...` any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FACTORS = ("lora_embedding_A", "lora_embedding_B")  # PEFT's names


class OverTable(nn.Module):
    """Stands in the place of an embedding, its ``base``: model code that looks at its sizes finds the base's."""

    base: Any

    def scaled(self, x_D: Tensor) -> Tensor:
        """As the table scales what it looks up (Gemma's does)."""
        scale = getattr(self.base, "embed_scale", None)
        if scale is None:
            return x_D
        return x_D * (scale.to(x_D.dtype) if isinstance(scale, Tensor) else scale)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.base.weight
        return weight

    @property
    def num_embeddings(self) -> int:
        return int(self.base.num_embeddings)

    @property
    def embedding_dim(self) -> int:
        return int(self.base.embedding_dim)

    @property
    def padding_idx(self) -> int | None:
        index: int | None = self.base.padding_idx
        return index


class LoRAEmbedding(OverTable):
    """y = (E + s (B A)^T)[ids] with E (V, D) frozen, A (R, V) and B (D, R) trained in float32.

    As PEFT's: A begins as zero and B at random, so the output is the table's, bit for bit. A table that scales what
    it looks up (Gemma's) scales the update alike; the row of the padding is not trained.
    """

    start_A = start_B = lora_magnitude_vector = None  # as a plain LoRALinear's

    def __init__(self, base: nn.Embedding, r: int, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling
        device = base.weight.device
        self.lora_embedding_A = nn.Parameter(torch.zeros(r, base.num_embeddings, device=device))
        self.lora_embedding_B = nn.Parameter(torch.zeros(base.embedding_dim, r, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        y_D = self.base(ids)
        z_R = F.embedding(ids, self.lora_embedding_A.T, padding_idx=self.base.padding_idx).to(y_D.dtype)
        return y_D + self.scaled(self.scaling * F.linear(z_R, self.lora_embedding_B.to(y_D.dtype)))

    @torch.no_grad()
    def begin(self, a_RV: Tensor, b_DR: Tensor) -> None:
        self.lora_embedding_A.copy_(a_RV)
        self.lora_embedding_B.copy_(b_DR)

    def begin_at_random(self, generator: torch.Generator) -> None:
        """A zero, B from N(0, 1)."""
        b_DR = torch.randn(self.lora_embedding_B.shape, generator=generator)
        self.begin(torch.zeros(self.lora_embedding_A.shape), b_DR)

    def trained(self) -> dict[str, Tensor]:
        return dict(zip(FACTORS, (self.lora_embedding_A, self.lora_embedding_B), strict=True))

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.begin(*(tensors[name] for name in FACTORS))

    # The names under which other adapters hold their factors.
    @property
    def lora_A(self) -> Tensor:  # noqa: N802
        return self.lora_embedding_A

    @property
    def lora_B(self) -> Tensor:  # noqa: N802
        return self.lora_embedding_B

    @property
    def r(self) -> int:
        return self.lora_embedding_A.shape[0]

    @property
    def file_rank(self) -> int:
        return self.r


def is_plain_table(module: nn.Module) -> bool:
    """Whether looking rows up (and scaling them) is all that an embedding does."""
    known = type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"))
    return known and getattr(module, "max_norm", None) is None
