"""The best update of a lower rank: the first singular directions of B A (Eckart and Young, 1936).

Shape suffixes: I in_features, O out_features, R rank, K the lesser of R, I and O, N the new rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.adapters.adapter import LowRank
from lora_cli.adapters.spectrum import spectrum


@dataclass(frozen=True)
class Shrunk:
    """An update of a lower rank, and the share of the squared singular values that it kept."""

    update: LowRank
    energy: float


def energies(values_K: Tensor) -> Tensor:
    """(K,) the share of the squared singular values that the first 1, 2, ... of them hold; of a zero update 1."""
    sums_K = values_K.double().square().cumsum(0)
    return sums_K / sums_K[-1] if float(sums_K[-1]) else torch.ones_like(sums_K)


def least_rank(values_K: Tensor, energy: float) -> int:
    """The least rank, 1 or more, that keeps this share of the squared singular values."""
    return 1 + int((energies(values_K) < energy).sum())


def shrink_update(update: LowRank, *, rank: int | None = None, keep_energy: float | None = None) -> Shrunk:
    """At most ``rank``, or the least rank that keeps ``keep_energy``; the scale and the dtype stay.

    An update whose rank is low enough already stays as it is, bit for bit.
    """
    parts = spectrum(update.lora_A, update.lora_B)
    wanted = rank if rank is not None else least_rank(parts.values_K, keep_energy or 1.0)
    if wanted >= update.lora_A.shape[0]:
        return Shrunk(update, 1.0)
    n = min(wanted, len(parts.values_K))
    root_N = parts.values_K[:n].sqrt()  # shared out evenly, so that A and B are of like size
    a_NI = (root_N[:, None] * parts.v_KI[:n]).to(update.lora_A.dtype).contiguous()
    b_ON = (parts.u_OK[:, :n] * root_N).to(update.lora_B.dtype).contiguous()
    return Shrunk(LowRank(a_NI, b_ON, update.scaling), float(energies(parts.values_K)[n - 1]))
