"""Rows of different lengths laid end to end: what takes the place of padding.

Shape suffixes: B rows, N tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Piece(Protocol):
    """Of the work among rows."""

    @property
    def num_scores(self) -> int: ...


SomePiece = TypeVar("SomePiece", bound=Piece)


@dataclass(frozen=True)
class Rows:
    """Where each row begins and ends, on the host for loops and on the device for kernels.

    With a ``prefix``, the first row is what all others begin with: they hold only what comes behind it, and see
    its keys before their own.
    """

    lengths: tuple[int, ...]
    bounds: Tensor  # (B + 1,) int32: bounds[i] is where row i begins
    prefix: int = 0
    filled: bool = False  # the last row is filling, and continues nothing
    key_bounds: Tensor = None  # type: ignore[assignment]  # (B + 1,) int32: as bounds, of the keys that rows see
    key_places: Tensor = None  # type: ignore[assignment]  # (M,) int64: where those keys are among the N tokens
    stands_for: str | None = None  # the kind of device whose way is only rehearsed

    def __post_init__(self) -> None:
        assert self.lengths and min(self.lengths) > 0
        assert self.prefix in (0, self.lengths[0])
        assert self.bounds.shape == (len(self.lengths) + 1,) and self.bounds.dtype == torch.int32
        if self.key_bounds is None:
            bounds = _bounds(self.key_lengths) if self.prefix else self.bounds
            object.__setattr__(self, "key_bounds", bounds)
            object.__setattr__(self, "key_places", self._key_places())

    @staticmethod
    def of(lengths: list[int], *, prefix: int = 0, filled: bool = False) -> Rows:
        return Rows(tuple(lengths), _bounds(lengths), prefix, filled)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """How many keys each row sees at most: the prefix's and its own."""
        return (self.lengths[0], *(self.prefix + length for length in self.lengths[1:]))

    def observe(self, module: object, sight: object) -> None:
        """Told by the attention of each module how it looks at the rows; ``ObservedRows`` take note of it."""

    def slices(self) -> Iterator[slice]:
        """The tokens of each row."""
        return _slices(self.lengths)

    def key_slices(self) -> Iterator[slice]:
        """The keys that each row sees, among those of ``key_places``."""
        return _slices(self.key_lengths)

    def in_turn(self, pieces: list[SomePiece]) -> list[SomePiece]:
        """Work that is done one piece after the other, and needs no more memory than the largest."""
        return pieces

    def positions(self) -> Tensor:
        """(N,) int64: each token's place in its own row."""
        begins = [0, *([self.prefix] * (len(self.lengths) - 1))]
        if self.filled:
            begins[-1] = 0  # it must not run over a table of positions
        return torch.cat([torch.arange(at, at + length) for at, length in zip(begins, self.lengths, strict=True)])

    def _key_places(self) -> Tensor:
        places = torch.arange(self.num_tokens)
        if not self.prefix:
            return places
        first, *others = self.slices()
        return torch.cat([places[first], *(part for row in others for part in (places[first], places[row]))])

    def to(self, device: torch.device) -> Rows:
        moved = (tensor.to(device, non_blocking=True) for tensor in (self.bounds, self.key_bounds, self.key_places))
        bounds, key_bounds, key_places = moved
        return Rows(self.lengths, bounds, self.prefix, self.filled, key_bounds, key_places)


def _bounds(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _slices(lengths: Iterable[int]) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise([0, *accumulate(lengths)]))


def pad_rows(packed_ND: Tensor, rows: Rows, count: int) -> Tensor:
    """(N, D) -> (B, T, D): the first ``count`` rows side by side, zeros behind each."""
    padded_BTD = packed_ND.new_zeros(count, max(rows.lengths[:count]), *packed_ND.shape[1:])
    for number, row in zip(range(count), rows.slices(), strict=False):
        padded_BTD[number, : rows.lengths[number]] = packed_ND[row]
    return padded_BTD
