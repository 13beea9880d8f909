"""Rows of different lengths laid end to end: what takes the place of padding.

Shape suffixes: B rows, N tokens of all rows, M keys that they see, counted anew for each row, E tokens of an ending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from lora_cli.ops.sending import send


class Piece(Protocol):
    """Of the work among rows."""

    @property
    def num_scores(self) -> int: ...


SomePiece = TypeVar("SomePiece", bound=Piece)
Source = Callable[["Rows", Tensor, Tensor], tuple[Tensor, Tensor]]


def own_keys(rows: Rows, key_NKD: Tensor, value_NKD: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K, D): each row's keys and values, behind those of the prefix that it shares."""
    if not rows.prefix:
        return key_NKD, value_NKD
    return key_NKD.index_select(0, rows.key_places), value_NKD.index_select(0, rows.key_places)


@dataclass(frozen=True)
class Rows:
    """Where each row begins and ends, on the host for loops and on the device for kernels.

    With a ``prefix``, the first row is what all others begin with: they hold only what comes behind it, and see
    its keys before their own.
    """

    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]  # how many keys each row sees at most
    offsets: tuple[int, ...]  # where among those its first token stands
    bounds: Tensor  # (B + 1,) int32: bounds[i] is where row i begins
    key_bounds: Tensor  # (B + 1,) int32: as bounds, of the keys that rows see
    key_places: Tensor  # (M,) int64: where those keys are among the N tokens
    prefix: int = 0
    filled: bool = False  # the last row is filling, and continues nothing
    stands_for: str | None = None  # the kind of device whose way is only rehearsed
    source: Source = own_keys  # of the keys and values that attention looks at
    ending: Ending | None = None  # what alone is looked at behind the last layer, where it is not everything

    def __post_init__(self) -> None:
        assert self.lengths and min(self.lengths) > 0
        assert self.prefix in (0, self.lengths[0])
        assert self.bounds.shape == self.key_bounds.shape == (len(self.lengths) + 1,)
        assert self.bounds.dtype == self.key_bounds.dtype == torch.int32

    @classmethod
    def of(cls, lengths: list[int], *, prefix: int = 0, filled: bool = False, stands_for: str | None = None) -> Self:
        offsets = [0, *[prefix] * (len(lengths) - 1)]
        key_lengths = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
        bounds, key_places = _bounds(lengths), _key_places(lengths, prefix)
        key_bounds = _bounds(key_lengths) if prefix else bounds
        given = (tuple(lengths), tuple(key_lengths), tuple(offsets), bounds, key_bounds, key_places)
        return cls(*given, prefix, filled, stands_for)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def end_with_their_keys(self) -> bool:
        """Whether each row's last token is the last that it sees."""
        ends = (offset + length for offset, length in zip(self.offsets, self.lengths, strict=True))
        return all(end == keys for end, keys in zip(ends, self.key_lengths, strict=True))

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
        begins = list(self.offsets)
        if self.filled:
            begins[-1] = 0  # it must not run over a table of positions
        return torch.cat([torch.arange(at, at + length) for at, length in zip(begins, self.lengths, strict=True)])

    def part(self, starts: list[int], lengths: list[int]) -> Self:
        """So many tokens of each row from its ``starts`` on, which see all that their row sees."""
        offsets = tuple(offset + start for offset, start in zip(self.offsets, starts, strict=True))
        nowhere = self.key_places.new_empty(0)  # whoever runs the part knows the keys of the whole
        whole = replace(self, prefix=0, filled=False, key_places=nowhere)
        return replace(whole, lengths=tuple(lengths), offsets=offsets, bounds=_bounds(lengths))

    def to(self, device: torch.device) -> Self:
        """Its tensors on the device; of the keys' places only those that someone asks for."""
        places = send(self.key_places, device) if self.prefix else self.key_places
        bounds, key_bounds = send(self.bounds, device), send(self.key_bounds, device)
        return replace(self, bounds=bounds, key_bounds=key_bounds, key_places=places)


@dataclass(frozen=True)
class Ending:
    """What of each row is looked at behind the last layer: there, nothing else needs to be computed."""

    rows: Rows  # its tokens; they see all that their rows see
    places: Tensor  # (E,) int64: where they are among the N tokens
    wanted: Tensor  # int64: where among them is what the loss looks at

    @staticmethod
    def of(rows: Rows, starts: list[int], lengths: list[int], wanted: Tensor) -> Ending:
        """``wanted`` are places among the N tokens."""
        begins = [row.start + start for row, start in zip(rows.slices(), starts, strict=True)]
        places = torch.cat([torch.arange(begin, begin + n) for begin, n in zip(begins, lengths, strict=True)])
        return Ending(rows.part(starts, lengths), places, torch.searchsorted(places, wanted))

    def to(self, device: torch.device) -> Ending:
        return Ending(self.rows.to(device), send(self.places, device), send(self.wanted, device))


def _bounds(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _key_places(lengths: list[int], prefix: int) -> Tensor:
    places = torch.arange(sum(lengths))
    if not prefix:
        return places
    first, *others = _slices(lengths)
    return torch.cat([places[first], *(part for row in others for part in (places[first], places[row]))])


def _slices(lengths: Iterable[int]) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise([0, *accumulate(lengths)]))


def pad_rows(packed_ND: Tensor, rows: Rows, count: int) -> Tensor:
    """(N, D) -> (B, T, D): the first ``count`` rows side by side, zeros behind each."""
    padded_BTD = packed_ND.new_zeros(count, max(rows.lengths[:count]), *packed_ND.shape[1:])
    for number, row in zip(range(count), rows.slices(), strict=False):
        padded_BTD[number, : rows.lengths[number]] = packed_ND[row]
    return padded_BTD
