"""How A and B begin, by the names that PEFT gives it.

A kind is one function that makes A and B, and a line in ``INITIALISATIONS``. Most begin with B = 0, so that the
adapted model begins as the base; those with a start begin elsewhere, and their update counts from there.

Shape suffixes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_cli.adapters.embedding import LoRAEmbedding
from lora_cli.adapters.layer import LoRALinear, weight_of
from lora_cli.adapters.measured import Measured, Rows, eva, lora_ga
from lora_cli.ops.low_rank import dense
from lora_cli.recipe import LoraSection
from lora_cli.seeds import drawing_from, stream

Factors = tuple[Tensor, Tensor]  # A (R, I), B (O, R)
Begin = Callable[[LoRALinear, torch.Generator], Factors]


def kaiming_uniform(layer: LoRALinear, generator: torch.Generator) -> Factors:
    """A from U(-1/sqrt(I), 1/sqrt(I)): Kaiming-uniform with a = sqrt(5), as nn.Linear and PEFT begin.

    arXiv:1502.01852, eq. 14 with gain sqrt(2 / (1 + a^2)).
    """
    bound = 1 / math.sqrt(layer.lora_A.shape[1])
    return torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator), no_update(layer)


def gaussian(layer: LoRALinear, generator: torch.Generator) -> Factors:
    """A from N(0, 1/R^2), as PEFT's ``gaussian``."""
    return torch.empty(layer.lora_A.shape).normal_(std=1 / layer.r, generator=generator), no_update(layer)


def orthogonal(layer: LoRALinear, generator: torch.Generator) -> Factors:
    """B A = 0 with neither of them zero: as PEFT's ``orthogonal``. R must be even.

    A = Q_odd^T X / 10 and B = Y^T Q_even / 10, with the rows of an orthogonal Q and normal X, Y.
    """
    (r, in_features), out_features = layer.lora_A.shape, layer.lora_B.shape[0]
    q_RR = torch.linalg.qr(torch.randn(r, r, generator=generator))[0]
    a_RI = q_RR[0::2].T @ torch.randn(in_features, r // 2, generator=generator).T
    b_OR = torch.randn(r // 2, out_features, generator=generator).T @ q_RR[1::2]
    return a_RI / 10, b_OR / 10


def pissa(layer: LoRALinear, generator: torch.Generator, niter: int | None = None) -> Factors:
    """The R largest singular directions of W (arXiv:2404.02948, eqs. 2 and 3), each factor with their roots.

    With ``niter`` by randomised subspace iteration (arXiv:0909.4061, algorithm 4.4): much faster, nearly the same.
    """
    weight_OI = _weight(layer)
    if niter is None:
        u_OK, s_K, vh_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        with drawing_from(generator):
            u_OK, s_K, v_IK = torch.svd_lowrank(weight_OI, layer.r, niter=niter)
        vh_KI = v_IK.T
    roots_R = (s_K[: layer.r] / layer.scaling).sqrt()
    return roots_R[:, None] * vh_KI[: layer.r], u_OK[:, : layer.r] * roots_R


def olora(layer: LoRALinear, generator: torch.Generator) -> Factors:
    """The first R columns and rows of W = Q R (arXiv:2406.01775, algorithm 1)."""
    q_OK, r_KI = torch.linalg.qr(_weight(layer))
    return r_KI[: layer.r], q_OK[:, : layer.r]


def no_update(layer: LoRALinear) -> Tensor:
    return torch.zeros(layer.lora_B.shape)


def _weight(layer: LoRALinear) -> Tensor:
    """(O, I) float32."""
    return dense(*weight_of(layer.base), torch.float32).detach().float()


@dataclass(frozen=True)
class Kind:
    """One way to begin: from the layer alone, or (``measured``) from rows that the model is run on."""

    begin: Begin | None = None
    measured: Measured | None = None
    has_start: bool = False


INITIALISATIONS = {
    "true": Kind(kaiming_uniform),
    "gaussian": Kind(gaussian),
    "orthogonal": Kind(orthogonal),
    "pissa": Kind(pissa, has_start=True),
    "olora": Kind(olora, has_start=True),
    "eva": Kind(measured=eva),
    "lora_ga": Kind(measured=lora_ga, has_start=True),
    "loftq": Kind(),  # lies beside the backbone that is made with it: ``backbone.py``
}
PISSA_NITER = re.compile(r"pissa_niter_([1-9][0-9]?)")


def kind_of(value: bool | str) -> Kind:
    """What `lora.init_lora_weights` asks for."""
    fast = PISSA_NITER.fullmatch(str(value))
    if fast:
        return Kind(partial(pissa, niter=int(fast[1])), has_start=True)
    return INITIALISATIONS[str(value).lower()]


@torch.no_grad()
def initialise(layers: dict[str, Any], lora: LoraSection, seed: int, rows: Rows | None = None) -> None:
    """Fill every A and B, from a stream named after its module: adding a module changes no other one.

    ``rows`` are for the kinds that are measured on them. An embedding has one way to begin, whatever the kind.
    """
    kind = kind_of(lora.init_lora_weights)
    tables = {name: layer for name, layer in layers.items() if isinstance(layer, LoRAEmbedding)}
    for name, table in tables.items():
        table.begin_at_random(stream(seed, "init", name))
    layers = {name: layer for name, layer in layers.items() if name not in tables}
    if kind.begin is not None:
        for name, layer in layers.items():
            layer.begin(*kind.begin(layer, stream(seed, "init", name)))
    if kind.measured is not None:
        assert rows is not None
        for name, factors in kind.measured(layers, lora, rows):
            layers[name].begin(*factors)
