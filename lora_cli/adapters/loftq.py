"""LoftQ: a quantized weight and the low-rank factors that make up best for what quantizing it lost.

Shape suffixes: I in_features, O out_features, R rank, K the smaller of I and O.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_cli.ops.packing import Packed
from lora_cli.seeds import drawing_from, stream

KINDS = {2: "nf2", 3: "nf3", 4: "nf4", 8: "int8"}  # how each number of bits is stored
EXACT = 512  # up to here all singular vectors are found; of larger matrices the leading ones, by iteration
ITERATIONS = 8  # of the subspace: what quantizing loses has no few large directions, so they come slowly


@dataclass(frozen=True)
class Decomposed:
    """W ~ Q + s B A, and how far off it is: errors are Frobenius norms over that of W."""

    packed: Packed
    lora_A: Tensor  # (R, I) float32
    lora_B: Tensor  # (O, R) float32
    plain_error: float  # of the quantized weight alone, as it would be without factors
    error: float


@torch.no_grad()
def decompose(weight_OI: Tensor, kind: str, r: int, scaling: float, iterations: int) -> Decomposed:
    """Quantize W - s B A and decompose W - Q by turns (arXiv:2310.08659, algorithm 1), from B A = 0.

    The best of all turns is returned: later ones are nearly always better, and nothing makes sure that they are. W is
    left as it is; Q stands for a weight of its type.
    """
    whole_OI = weight_OI.float()
    norm = max(float(torch.linalg.vector_norm(whole_OI)), 1e-30)
    best: Decomposed | None = None
    rest_OI, plain = whole_OI, 0.0
    for _ in range(iterations):
        packed = Packed.of(rest_OI.to(weight_OI.dtype), kind)
        lost_OI = whole_OI - packed.weight().float()
        a_RI, b_OR = leading(lost_OI, r, scaling)
        update_OI = scaling * (b_OR @ a_RI)
        if best is None:
            plain = float(torch.linalg.vector_norm(lost_OI)) / norm
        error = float(torch.linalg.vector_norm(lost_OI - update_OI)) / norm
        if best is None or error < best.error:
            best = Decomposed(packed, a_RI, b_OR, plain, error)
        rest_OI = whole_OI - update_OI
    assert best is not None
    return best


def leading(matrix_OI: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B with s B A the best approximation of rank R, each with the roots of the singular values."""
    if min(matrix_OI.shape) <= EXACT:
        u_OK, s_K, vh_KI = torch.linalg.svd(matrix_OI, full_matrices=False)
        u_OK, s_K, vh_KI = u_OK[:, :r], s_K[:r], vh_KI[:r]
    else:
        with drawing_from(stream(0, "loftq")):
            u_OK, s_K, v_IK = torch.svd_lowrank(matrix_OI, r + min(r, 32), niter=ITERATIONS)
        u_OK, s_K, vh_KI = u_OK[:, :r], s_K[:r], v_IK.T[:r]
    roots_R = (s_K / scaling).sqrt()
    return roots_R[:, None] * vh_KI, u_OK * roots_R
