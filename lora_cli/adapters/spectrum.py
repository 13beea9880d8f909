"""Singular values, norms and angles of low-rank updates, without ever forming an O x I matrix.

An update is s B A. With B = Q P and A^T = Z X (QR), B A = Q (P X^T) Z^T, so all that is asked for is found in the
small matrix P X^T; everything is float64.

Shape suffixes: I in_features, O out_features, R rank, S rank of another update, K the lesser of R, I and O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_cli.adapters.adapter import LowRank

ROUNDING = 1e-6  # of the factors' norms: float32 in a product that should be zero
MOST_LOST = 0.02  # of an update's norm that writing it in a narrower type may cost


@dataclass(frozen=True)
class Spectrum:
    """B A = U diag(values) V, the values falling."""

    u_OK: Tensor
    values_K: Tensor
    v_KI: Tensor


def spectrum(a_RI: Tensor, b_OR: Tensor) -> Spectrum:
    """The singular value decomposition of B A (without the scale), by QR of both factors."""
    q_OK, p_KR = torch.linalg.qr(b_OR.double())
    z_IK, x_KR = torch.linalg.qr(a_RI.double().T)
    u, values, v = torch.linalg.svd(p_KR @ x_KR.T, full_matrices=False)
    return Spectrum(q_OK @ u, values, v @ z_IK.T)


def singular_values(update: LowRank) -> Tensor:
    """(K,) of s B A, falling."""
    p_KR = torch.linalg.qr(update.lora_B.double(), mode="r").R
    x_KR = torch.linalg.qr(update.lora_A.double().T, mode="r").R
    return abs(update.scaling) * torch.linalg.svdvals(p_KR @ x_KR.T)


def frobenius_norm(values_K: Tensor) -> float:
    return float(values_K.square().sum().sqrt())


def effective_rank(values_K: Tensor) -> float:
    """e to the entropy of the singular values over their sum (Roy and Vetterli, 2007); of a zero update 0.

    Between 1, where one direction is all there is, and K, where all are alike.
    """
    total = float(values_K.sum())
    if total == 0:
        return 0.0
    shares_K = values_K / total
    return float(torch.special.entr(shares_K).sum().exp())


def inner_product(one: LowRank, other: LowRank) -> float:
    """<s B A, t C D> = s t sum((B^T C) * (A D^T)): products of R x S numbers."""
    b_RS = one.lora_B.double().T @ other.lora_B.double()
    a_RS = one.lora_A.double() @ other.lora_A.double().T
    return one.scaling * other.scaling * float((b_RS * a_RS).sum())


def cosine(one: LowRank, other: LowRank) -> float | None:
    """Of the angle between two updates as vectors of O I numbers; None where one of them is zero."""
    lengths = frobenius_norm(singular_values(one)) * frobenius_norm(singular_values(other))
    return inner_product(one, other) / lengths if lengths else None


def weighted_sum(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The exact sum of w s B A as one update of scale 1, whose rank is the sum of the ranks."""
    scaled = [w * u.scaling * u.lora_A.double() for u, w in zip(updates, weights, strict=True)]
    return LowRank(torch.cat(scaled), torch.cat([u.lora_B.double() for u in updates], 1), 1.0)


def distance(one: LowRank, other: LowRank) -> float:
    """||s B A - t C D||, without the cancellation that the inner product would bring."""
    return frobenius_norm(singular_values(weighted_sum([one, other], [1.0, -1.0])))


def relative_distance(updates: Mapping[str, LowRank], others: Mapping[str, LowRank]) -> float:
    """How far all updates together are from others of the same modules, relative to their norm."""
    norm = math.hypot(*(frobenius_norm(singular_values(update)) for update in updates.values()))
    off = math.hypot(*(distance(update, others[name]) for name, update in updates.items()))
    return off / norm if norm else 0.0


def rounding_loss(updates: Mapping[str, LowRank], dtype: torch.dtype) -> float:
    """What rounding A and B changes of all updates together, relative to their norm.

    A few thousandths in bfloat16 of an adapter that began at zero; most of it, where the update is the small difference
    of two large products.
    """
    rounded = {name: replace(u, lora_A=u.lora_A.to(dtype), lora_B=u.lora_B.to(dtype)) for name, u in updates.items()}
    return relative_distance(updates, rounded)


def changes_nothing(updates: Mapping[str, LowRank]) -> bool:
    """Whether every s B A is zero but for the rounding of its factors, whether or not these are."""
    for update in updates.values():
        lengths = abs(update.scaling) * float(update.lora_A.double().norm() * update.lora_B.double().norm())
        if lengths and frobenius_norm(singular_values(update)) > ROUNDING * lengths:
            return False
    return True


def is_finite(update: LowRank) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in update.tensors.values())


def is_dead(update: LowRank) -> bool:
    """Whether A or B is all zero: the module does nothing."""
    return not bool(update.lora_A.any()) or not bool(update.lora_B.any())
