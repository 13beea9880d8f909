"""Which queries meet which keys in one product: rows cut into stretches, and stretches alike put together.

A tile holds a stretch of queries of each of some rows, all of which look at the same stretch of keys of their own row.
Rows of like length lie side by side, so that most tiles hold many of them: a few large products instead of many
small ones.

Shape suffixes: N queries and M keys of all rows, H query heads, K key-value heads, G = H / K, D head size; R rows of a
tile, S = R K its matrices, Q queries of a row (of S: times G), T keys; L queries and F keys of all tiles, with padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_cli.ops.products import onednn_multiplies
from lora_cli.ops.rows import Rows
from lora_cli.ops.sending import send
from lora_cli.ops.sight import INFINITE, Sight

MULTIPLE = 32  # lengths are padded to this: products of odd sizes take up to twice as long
QUERIES = (32, 64, 128)  # of a row in a tile: the fewer, the less is computed to be hidden; the more, the fewer tiles
TILE_PRICE = {2: 50_000, 4: 25_000, 8: 15_000}  # scores made in the time that a tile takes beside them, by item size
MOST_SCORES = 2**21  # of a tile of several rows
KEPT_KEYS = 512  # a row is short with at most as many
LIKE, LIKE_KEYS = 4, 512  # up to so many, rows share a padded length down to a fourth of the longest's


@dataclass(frozen=True)
class Tile:
    queries: slice  # of L
    all_keys: slice  # of F: every key of its rows
    matrices: int  # S
    keys: slice  # T, among each row's keys
    bias: Tensor | None  # (1 or R, 1, Q, 1, the last of T): minus infinity where a query does not see a key
    short: bool  # as all of its rows

    @property
    def num_scores(self) -> int:
        return (self.queries.stop - self.queries.start) * (self.keys.stop - self.keys.start)

    def of_queries(self, x_LD: Tensor) -> Tensor:
        """(S, Q, D), a view."""
        return x_LD[self.queries].view(self.matrices, -1, x_LD.shape[1])

    def of_keys(self, x_FD: Tensor) -> Tensor:
        """(S, T, D), a view."""
        return x_FD[self.all_keys].view(self.matrices, -1, x_FD.shape[1])[:, self.keys]

    def hide(self, scores_SQT: Tensor) -> None:
        """Mask in place."""
        if self.bias is not None:
            rows, _, queries, _, keys = self.bias.shape
            scores_RKQGT = scores_SQT.view(rows, -1, queries, scores_SQT.shape[1] // queries, scores_SQT.shape[2])
            scores_RKQGT[..., -keys:].add_(self.bias)


@dataclass(frozen=True)
class Places:
    """Where tokens lie in tiles: heads before tokens, each row padded with repetitions of its last one."""

    tokens: Tensor  # (L / G,) or (F,) int64, among N K or M K: what lies there
    padding: Tensor  # int64: where nothing new does
    back: Tensor  # (N K,) or (M K,) int64: where each one lies

    def fill(self, x: Tensor, per_head: int) -> Tensor:
        """(N, heads, D) -> (L or F, D), with ``per_head`` heads to a key-value head."""
        size = x.shape[-1]
        return x.reshape(-1, per_head * size).index_select(0, self.tokens).view(-1, size)

    def fill_with_zeros(self, x: Tensor, per_head: int) -> Tensor:
        """The same, but padding is zero: a gradient counts once."""
        filled = self.fill(x, per_head)
        filled.view(len(self.tokens), -1).index_fill_(0, self.padding, 0)
        return filled

    def empty(self, filled: Tensor, heads: int) -> Tensor:
        """The inverse of ``fill``: (N, heads, D)."""
        x = filled.view(len(self.tokens), -1).index_select(0, self.back)
        return x.view(-1, heads, filled.shape[-1])


@dataclass(frozen=True)
class Tiling:
    tiles: list[Tile]
    queries: Places
    keys: Places

    @property
    def num_kept(self) -> int:
        """Probabilities of short rows."""
        return sum(tile.num_scores for tile in self.tiles if tile.short)


def tiling_of(rows: Rows, query_NHD: Tensor, key_MKD: Tensor, sight: Sight) -> Tiling:
    heads, kv_heads = query_NHD.shape[1], key_MKD.shape[1]
    faster = query_NHD.dtype == torch.float32 and onednn_multiplies()  # scores are made in half the time then
    price = TILE_PRICE[query_NHD.dtype.itemsize] * (2 if faster else 1) // heads
    given = (rows.lengths, rows.key_lengths, rows.offsets)
    return _tiling(*given, heads, kv_heads, price, sight, query_NHD.device)


@dataclass(frozen=True)
class _Row:
    begin: int  # its first query, among N
    length: int
    first_key: int  # among M
    num_keys: int
    offset: int  # of its first query among its keys


class _Stretch(NamedTuple):
    """Of a row, padding included: queries by their places in what is its own, keys by theirs in all that it sees."""

    first_query: int
    end_query: int
    first_key: int
    end_key: int

    @property
    def num_queries(self) -> int:
        return self.end_query - self.first_query

    @property
    def num_scores(self) -> int:
        return self.num_queries * (self.end_key - self.first_key)


@dataclass(frozen=True)
class _Stack:
    """A tile before it has a place: the same stretch of neighbours in a group."""

    group: int
    first: int  # of the group's rows
    rows: list[_Row]
    stretch: _Stretch


@lru_cache(maxsize=8)  # the same in every layer
def _tiling(
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    offsets: tuple[int, ...],
    heads: int,
    kv_heads: int,
    price: int,
    sight: Sight,
    device: torch.device,
) -> Tiling:
    begins, first_keys = (accumulate(counts, initial=0) for counts in (lengths, key_lengths))
    numbers = zip(begins, lengths, first_keys, key_lengths, offsets, strict=False)
    groups = _groups([_Row(*of_row) for of_row in numbers])
    cuts = ([*_stacks(groups, sight, heads, size)] for size in QUERIES)
    stacks = min(cuts, key=lambda cut: sum(price + len(stack.rows) * stack.stretch.num_scores for stack in cut))
    widths = [kv_heads * _padded(group[0].num_keys) for group in groups]
    starts = [0, *accumulate(len(group) * width for group, width in zip(groups, widths, strict=True))]
    tiles, end = [], 0
    for stack in stacks:
        start, rows, stretch = end, len(stack.rows), stack.stretch
        end += rows * heads * stretch.num_queries
        first_key = starts[stack.group] + stack.first * widths[stack.group]
        all_keys = slice(first_key, first_key + rows * widths[stack.group])
        bias = _bias_of(stack, sight, device)
        keys, short = slice(stretch.first_key, stretch.end_key), groups[stack.group][0].num_keys <= KEPT_KEYS
        tiles.append(Tile(slice(start, end), all_keys, rows * kv_heads, keys, bias, short))
    of_queries = [_Block.of_queries(stack) for stack in stacks]
    of_keys = [_Block.of_keys(group) for group in groups]
    return Tiling(tiles, *(_places(blocks, kv_heads, device) for blocks in (of_queries, of_keys)))


def forget_tilings() -> None:
    """As in a process that has attended to nothing yet."""
    _tiling.cache_clear()
    _bias.cache_clear()


def _groups(rows: list[_Row]) -> list[list[_Row]]:
    """Rows of like length, the longest first."""
    groups: list[list[_Row]] = []
    for row in sorted(rows, key=lambda row: -row.num_keys):
        if groups and _alike(groups[-1][0], row):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _alike(longest: _Row, row: _Row) -> bool:
    if longest.num_keys > LIKE_KEYS:  # its products are large enough alone
        return _padded(row.num_keys) == _padded(longest.num_keys)
    return row.num_keys * LIKE >= longest.num_keys


def _stacks(groups: list[list[_Row]], sight: Sight, heads: int, size: int) -> Iterator[_Stack]:
    """Every stretch of every row, those together that are equal and of neighbours in a group."""
    for number, group in enumerate(groups):
        places_of: dict[_Stretch, list[int]] = {}
        for place, row in enumerate(group):
            for stretch in _stretches(_padded(row.length), _padded(row.num_keys), row.offset, sight, size):
                places_of.setdefault(stretch, []).append(place)
        for stretch, places in places_of.items():
            most = max(1, MOST_SCORES // (heads * stretch.num_scores))
            for first, end in _runs(places, most):
                yield _Stack(number, first, group[first:end], stretch)


def _runs(places: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Ascending numbers as stretches without gaps, of so many at most."""
    first = end = places[0]
    for place in places:
        if place > end or end - first == most:
            yield first, end
            first = place
        end = place + 1
    yield first, end


@lru_cache(maxsize=1024)
def _stretches(queries: int, keys: int, offset: int, sight: Sight, size: int) -> tuple[_Stretch, ...]:
    """Of a row with so many of both, padding included."""
    found = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        seen = sight.keys_of(slice(offset + start, offset + end), keys)
        first_key, end_key = seen.start // MULTIPLE * MULTIPLE, min(keys, _padded(seen.stop))
        found.append(_Stretch(start, end, first_key, end_key))
    return tuple(found)


def _padded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


@dataclass(frozen=True)
class _Block:
    """The same places of some rows, which may reach beyond a row's end."""

    begins: list[int]  # the row's first token
    lengths: list[int]
    first: int
    end: int

    @staticmethod
    def of_queries(stack: _Stack) -> _Block:
        begins, lengths = [row.begin for row in stack.rows], [row.length for row in stack.rows]
        return _Block(begins, lengths, stack.stretch.first_query, stack.stretch.end_query)

    @staticmethod
    def of_keys(group: list[_Row]) -> _Block:
        begins, lengths = [row.first_key for row in group], [row.num_keys for row in group]
        return _Block(begins, lengths, 0, _padded(lengths[0]))


def _places(blocks: list[_Block], kv_heads: int, device: torch.device) -> Places:
    """Inside a block rows come before heads, and heads before the row's places."""
    heads_K1 = np.arange(kv_heads)[:, None]
    tokens, real = [], []
    for block in blocks:
        begins_R1, lengths_R1 = np.array(block.begins)[:, None], np.array(block.lengths)[:, None]
        place_T = np.arange(block.first, block.end)
        token_RT = begins_R1 + np.minimum(place_T, lengths_R1 - 1)
        token_RKT = token_RT[:, None] * kv_heads + heads_K1
        tokens.append(token_RKT.ravel())
        real.append(np.broadcast_to((place_T < lengths_R1)[:, None], token_RKT.shape).ravel())
    all_tokens, is_real = np.concatenate(tokens), np.concatenate(real)
    lies_at = np.flatnonzero(is_real)
    back = np.empty_like(lies_at)
    back[all_tokens[lies_at]] = lies_at
    tables = (all_tokens, np.flatnonzero(~is_real), back)
    return Places(*(send(torch.from_numpy(table), device) for table in tables))


def _bias_of(stack: _Stack, sight: Sight, device: torch.device) -> Tensor | None:
    offsets, stretch = tuple(row.offset for row in stack.rows), stack.stretch
    offsets = offsets if len(set(offsets)) > 1 else offsets[:1]
    plain = sight.causal and sight.window is None
    # of a plain stretch only its own columns differ, and alike in every one
    start = min(min(offsets) + stretch.first_query, stretch.end_key) if plain else stretch.first_key
    # there, padding is hidden from all before it, and sees something itself
    ends = None if plain else tuple(row.num_keys - start for row in stack.rows)
    first = tuple(offset + stretch.first_query - start for offset in offsets)
    return _bias(sight, first, stretch.num_queries, stretch.end_key - start, ends, device)


@lru_cache(maxsize=64)  # the same few in every layer
def _bias(
    sight: Sight, first: tuple[int, ...], queries: int, keys: int, ends: tuple[int, ...] | None, device: torch.device
) -> Tensor | None:
    """(1 or R, 1, Q, 1, keys): minus infinity where a query does not see a key, or it is padding; None if nowhere."""
    each = [sight.hidden(slice(at, at + queries), slice(0, keys), device) for at in first]
    none = torch.zeros(queries, keys, dtype=torch.bool, device=device)
    hidden_RQT = torch.stack([none if hidden is None else hidden for hidden in each])
    if ends is not None:
        ends_R11 = send(torch.tensor(ends), device)[:, None, None]
        first_R1 = send(torch.tensor(first), device)[:, None]
        position_RQ1 = (first_R1 + torch.arange(queries, device=device))[..., None]
        hidden_RQT = hidden_RQT | (torch.arange(keys, device=device) >= ends_R11)
        hidden_RQT = hidden_RQT & (position_RQ1 < ends_R11)  # padding sees all: without anything to see, it is NaN
    if all(hidden is None for hidden in each) and (ends is None or min(ends) >= keys):
        return None
    bias_RQT = torch.zeros(hidden_RQT.shape, device=device).masked_fill_(hidden_RQT, INFINITE)
    return bias_RQT[:, None, :, None]
