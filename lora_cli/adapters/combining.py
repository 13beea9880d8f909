"""Several updates of one module made into one, by the methods of PEFT's ``add_weighted_adapter``.

``linear``, ``ties`` and the two of DARE work on the factors: each A and each B is scaled by the root of its weight
times its scale, and As and Bs are put together apart from one another. So cross terms B_1 A_2 appear, and the result
is not the sum of the updates; ``cat`` is that sum exactly, ``svd`` its best update of a given rank.

Shape suffixes: M adapters; I in_features, O out_features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from lora_cli.adapters.adapter import LowRank
from lora_cli.adapters.spectrum import spectrum, weighted_sum
from lora_cli.seeds import stream

PER_FACTOR = ("linear", "ties", "dare_linear", "dare_ties")  # these need equal ranks and modules
METHODS = ("linear", "cat", "ties", "dare_linear", "dare_ties", "svd")
SPARSE = ("ties", "dare_linear", "dare_ties")  # these read the density


@dataclass(frozen=True)
class Settings:
    """How to combine. ``density`` is the share of numbers that are kept, ``rank`` the result's (svd only)."""

    method: str
    density: float = 0.5
    rank: int | None = None
    seed: int = 42


def combine_updates(name: str, updates: Sequence[LowRank], weights: Sequence[float], settings: Settings) -> LowRank:
    """One update of scale 1 in the type of the inputs; ``name`` chooses the random numbers of DARE."""
    dtype = reduce(torch.promote_types, (tensor.dtype for u in updates for tensor in u.tensors.values()))
    if settings.method == "cat":
        made = weighted_sum(updates, weights)
    elif settings.method == "svd":
        made = _truncated(weighted_sum(updates, weights), settings.rank or max(len(u.lora_A) for u in updates))
    else:
        made = _by_factor(name, updates, weights, settings)
    return LowRank(made.lora_A.to(dtype).contiguous(), made.lora_B.to(dtype).contiguous(), 1.0)


def _truncated(update: LowRank, rank: int) -> LowRank:
    parts = spectrum(update.lora_A, update.lora_B)
    root = parts.values_K[:rank].sqrt()
    return LowRank(root[:, None] * parts.v_KI[:rank], parts.u_OK[:, :rank] * root, 1.0)


def _by_factor(name: str, updates: Sequence[LowRank], weights: Sequence[float], settings: Settings) -> LowRank:
    """As and Bs apart; a negative weight goes into A alone, or it would cancel itself in the product."""
    totals = [w * u.scaling for u, w in zip(updates, weights, strict=True)]
    roots_B = [math.sqrt(abs(total)) for total in totals]
    roots_A = [math.copysign(root, total) for root, total in zip(roots_B, totals, strict=True)]
    method = _METHODS[settings.method]
    a_RI = method([u.lora_A.double() for u in updates], roots_A, settings, (name, "lora_A"))
    b_OR = method([u.lora_B.double() for u in updates], roots_B, settings, (name, "lora_B"))
    return LowRank(a_RI, b_OR, 1.0)


def _sum(tensors_M: list[Tensor], weights: list[float]) -> Tensor:
    return sum((w * tensor for tensor, w in zip(tensors_M, weights, strict=True)), torch.zeros_like(tensors_M[0]))


def trimmed(tensor: Tensor, density: float) -> Tensor:
    """The largest magnitudes, a share of ``density`` of them; the others zero.  TIES, arXiv:2306.01708, 3.1"""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(tensor.shape)


def dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each number kept with probability ``density`` and divided by it: the mean stays.  DARE, arXiv:2311.03099, 3.1"""
    return tensor * torch.empty_like(tensor).bernoulli_(density, generator=generator) / density


def agreed(tensors_M: list[Tensor], weights: list[float]) -> Tensor:
    """The mean over those of the elected sign, that of the plain sum.  TIES, arXiv:2306.01708, 3.2 and 3.3

    The divisor is the number of those, not their weights, as in PEFT.
    """
    stacked = torch.stack(tensors_M)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agrees = stacked.sign() == elected
    weighted = torch.stack([w * tensor for tensor, w in zip(tensors_M, weights, strict=True)])
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


_Method = Callable[[list[Tensor], list[float], Settings, tuple[str, str]], Tensor]


def _linear(tensors_M: list[Tensor], weights: list[float], settings: Settings, where: tuple[str, str]) -> Tensor:
    return _sum(tensors_M, weights)


def _ties(tensors_M: list[Tensor], weights: list[float], settings: Settings, where: tuple[str, str]) -> Tensor:
    return agreed([trimmed(tensor, settings.density) for tensor in tensors_M], weights)


def _dare_linear(tensors_M: list[Tensor], weights: list[float], settings: Settings, where: tuple[str, str]) -> Tensor:
    return _sum(_dropped_all(tensors_M, settings, where), weights)


def _dare_ties(tensors_M: list[Tensor], weights: list[float], settings: Settings, where: tuple[str, str]) -> Tensor:
    return agreed(_dropped_all(tensors_M, settings, where), weights)


def _dropped_all(tensors_M: list[Tensor], settings: Settings, where: tuple[str, str]) -> list[Tensor]:
    """Every adapter, module and factor draws from a stream of its own."""
    return [
        dropped(tensor, settings.density, stream(settings.seed, "dare", *where, index))
        for index, tensor in enumerate(tensors_M)
    ]


_METHODS: dict[str, _Method] = {
    "linear": _linear,
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
}
