"""Rows of different lengths laid end to end: what takes the place of padding.

Shape suffixes: B rows, N tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where each row begins and ends, on the host for loops and on the device for kernels."""

    lengths: tuple[int, ...]
    bounds: Tensor  # (B + 1,) int32: bounds[i] is where row i begins
    stands_for: str | None = None  # the kind of device whose way is only rehearsed

    def __post_init__(self) -> None:
        assert self.lengths and min(self.lengths) > 0
        assert self.bounds.shape == (len(self.lengths) + 1,) and self.bounds.dtype == torch.int32

    @staticmethod
    def of(lengths: list[int]) -> Rows:
        return Rows(tuple(lengths), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def observe(self, module: object, sight: object) -> None:
        """Told by the attention of each module how it looks at the rows; ``ObservedRows`` take note of it."""

    def slices(self) -> Iterator[slice]:
        """The tokens of each row."""
        return (slice(start, end) for start, end in pairwise([0, *accumulate(self.lengths)]))

    def in_turn(self) -> Iterator[slice]:
        """The tokens of each row, for work that ends with the row."""
        return self.slices()

    def positions(self) -> Tensor:
        """(N,) int64: each token's place in its own row."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    def to(self, device: torch.device) -> Rows:
        return Rows(self.lengths, self.bounds.to(device, non_blocking=True))


def pad_rows(packed_ND: Tensor, rows: Rows, count: int) -> Tensor:
    """(N, D) -> (B, T, D): the first ``count`` rows side by side, zeros behind each."""
    padded_BTD = packed_ND.new_zeros(count, max(rows.lengths[:count]), *packed_ND.shape[1:])
    for number, row in zip(range(count), rows.slices(), strict=False):
        padded_BTD[number, : rows.lengths[number]] = packed_ND[row]
    return padded_BTD
