"""Which tokens of its row a token sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INFINITE = float("-inf")


@dataclass(frozen=True)
class Sight:
    """Which tokens of its row a token sees, and how scores are made."""

    scaling: float
    causal: bool = True
    window: int | None = None  # it sees tokens less than this far away, itself among them
    softcap: float | None = None  # scores become softcap * tanh(score / softcap): Gemma 2, arXiv:2408.00118

    def hidden(self, queries: slice, keys: slice, device: torch.device) -> Tensor | None:
        """(queries, keys) bool: True where a query does not see a key; None where each sees all of them."""
        last, first = queries.stop - 1 - keys.start, queries.start - (keys.stop - 1)  # the extreme distances
        ahead = self.causal and first < 0
        far = self.window is not None and max(last, -first) >= self.window
        if not ahead and not far:
            return None
        query_positions, key_positions = (torch.arange(s.start, s.stop, device=device) for s in (queries, keys))
        distance = query_positions[:, None] - key_positions
        hidden = distance < 0 if self.causal else torch.zeros_like(distance, dtype=torch.bool)
        return hidden if self.window is None else hidden | (distance.abs() >= self.window)

    def keys_of(self, queries: slice, length: int) -> slice:
        """The stretch of keys that some of these queries may see."""
        reach = length if self.window is None else self.window - 1
        last = queries.stop if self.causal else min(length, queries.stop + reach)
        return slice(max(0, queries.start - reach), last)
