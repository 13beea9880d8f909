"""The length of each row of W + s B A, without forming that matrix.

    ||w + s b A||^2 = ||w||^2 + 2 s b (A w) + s^2 b (A A^T) b        for each row w of W and b of B

arXiv:2402.09353, section 4.1, where it is the divisor of the magnitudes, and has no gradient (section 4.3).

Shape suffixes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.ops.precision import wide, wide_type


def row_squares(weight_OI: Tensor) -> Tensor:
    """(O,) ||w||^2 in the wide type."""
    return torch.linalg.vector_norm(weight_OI, dim=1, dtype=wide_type(weight_OI.dtype)).square()


@torch.no_grad()
def adapted_row_norms(weight_OI: Tensor, squares_O: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """(O,) in the wide type. ``squares_O`` are ``row_squares`` of the weight; with B = 0 it is their root, exactly."""
    crossed_RO = wide(F.linear(a_RI.to(weight_OI.dtype), weight_OI))
    gram_RR = wide(a_RI) @ wide(a_RI).T
    scaled_B = wide(b_OR) * scaling
    sums_O = 2 * (scaled_B * crossed_RO.T).sum(1) + (scaled_B @ gram_RR).mul_(scaled_B).sum(1)
    return (squares_O + sums_O).clamp_min_(0).sqrt_()
