"""Cross-entropy over supervised positions only, in float32, as a sum: micro-batches add up exactly.

Shape suffixes: N supervised positions, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def summed_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """sum_n -log softmax(logits_n)[target_n], in nats, float32."""
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
