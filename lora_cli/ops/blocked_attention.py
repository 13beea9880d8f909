"""Attention on the CPU: blocks of queries as batched matrix products.

Of short rows in two-byte types the probabilities are kept for the backward pass (measured: 6 % of a step's time for 9 %
of its memory; in float32 2 % for 11 %). Elsewhere they are made again there (arXiv:2205.14135, algorithm 4, without its
running maximum: a block sees all of its keys at once). Scores are float32; all else is computed in the inputs' type.

Shape suffixes: N queries and M keys of all rows, H query heads, K key-value heads, G = H / K, D head size; inside
a group R rows, P parts of each row's queries, S = R K P, T keys with padding, Q a block of a part's queries times G.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_cli.ops.precision import wide, wide_product, wide_type
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import INFINITE, Sight

BLOCK_SCORES = 2**19  # float32 scores of a block of queries: few enough to stay in a core's cache
BLOCK_QUERIES = {torch.float32: 64}  # measured best; the faster products of two-byte types like 128
KEPT_KEYS = 512  # keys of a row, at most, whose probabilities are kept: of longer ones they outgrow all else
MULTIPLE = 32  # rows are padded to this inside: products of odd sizes take up to twice as long


def attend_in_blocks(query_NHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, rows: Rows, sight: Sight) -> Tensor:
    """(N, H, D). Keys and values are those of ``rows.key_lengths``: each row's own, behind the shared prefix."""
    return _BlockedAttention.apply(query_NHD, key_MKD, value_MKD, rows, sight)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_NHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, rows: Rows, sight: Sight) -> Tensor:
        out_NHD = query_NHD.new_empty(*query_NHD.shape[:2], value_MKD.shape[2])
        groups = _groups_of(query_NHD, key_MKD, rows, sight)
        in_turn = rows.in_turn(groups)
        kept: list[Tensor] = []
        trains = any(ctx.needs_input_grad)
        for some, keys, group in in_turn:
            out_NHD[some], probabilities = _forward(query_NHD[some], key_MKD[keys], value_MKD[keys], group)
            kept += probabilities if trains and group.keeps_probabilities else []
        if trains and len(in_turn) < len(groups):  # a rehearsal: the others leave no less behind
            others = [group for *_, group in groups if group is not in_turn[0][2] and group.keeps_probabilities]
            kept += [query_NHD.new_empty(group.num_probabilities) for group in others]
        ctx.rows, ctx.sight = rows, sight
        ctx.save_for_backward(query_NHD, key_MKD, value_MKD, *kept)
        return out_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHD: Tensor) -> tuple[Any, ...]:
        query_NHD, key_MKD, value_MKD, *probabilities = ctx.saved_tensors
        kept = iter(probabilities)
        dq_NHD, dk_MKD, dv_MKD = (torch.empty_like(t) for t in (query_NHD, key_MKD, value_MKD))
        groups = _groups_of(query_NHD, key_MKD, ctx.rows, ctx.sight)
        for some, keys, group in ctx.rows.in_turn(groups):
            dq_NHD[some], dk_MKD[keys], dv_MKD[keys] = _backward(
                query_NHD[some], key_MKD[keys], value_MKD[keys], gradient_NHD[some], group, kept
            )
        return dq_NHD, dk_MKD, dv_MKD, None, None


@dataclass(frozen=True)
class _Side:
    """How one side of a group, its queries or its keys, is laid out heads first."""

    padded: int
    places: Tensor  # (N,) int64: where the rows' tokens lie among S * T

    @staticmethod
    def of(lengths: list[int], padded: int) -> _Side:
        places = [torch.arange(length) + number * padded for number, length in enumerate(lengths)]
        return _Side(padded, torch.cat(places))


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows that are padded to one length inside, so that they share their products.

    A tensor "heads first" is (S, T * G, D): for each of the rows, key heads and parts one matrix, with the queries of
    all heads that share this key head, padded with zeros to a length that products like. Part p of P holds each P-th
    query from the p-th on; keys are the same in all parts.
    """

    lengths: tuple[int, ...]  # of the rows' queries
    offset: int  # keys that come before the rows' own: those of a shared prefix
    heads: int
    kv_heads: int
    parts: int
    dtype: torch.dtype
    sight: Sight
    queries: _Side
    keys: _Side

    @property
    def shared(self) -> int:
        """Query heads to a key head."""
        return self.heads // self.kv_heads

    @property
    def keeps_probabilities(self) -> bool:
        """A cap on scores has a derivative of its own, which needs more than the probabilities."""
        return self.sight.softcap is None and self.dtype.itemsize == 2 and self.keys.padded <= KEPT_KEYS

    @property
    def num_probabilities(self) -> int:
        matrices = len(self.lengths) * self.kv_heads * self.parts
        return matrices * sum((rows.stop - rows.start) * (keys.stop - keys.start) for _, rows, keys in self.blocks())

    def queries_first(self, x_NHD: Tensor) -> Tensor:
        x_RTHD = self._padded_rows(x_NHD, self.queries)
        x_RTPKGD = x_RTHD.view(len(x_RTHD), -1, self.parts, self.kv_heads, self.shared, x_NHD.shape[-1])
        return x_RTPKGD.permute(0, 3, 2, 1, 4, 5).reshape(
            -1, self.queries.padded // self.parts * self.shared, x_NHD.shape[-1]
        )

    def queries_last(self, x_SQD: Tensor) -> Tensor:
        """The inverse, without the padding."""
        shape = (len(self.lengths), self.kv_heads, self.parts, -1, self.shared, x_SQD.shape[-1])
        x_RTPKGD = x_SQD.view(shape).permute(0, 3, 2, 1, 4, 5)
        return self._real(x_RTPKGD.reshape(-1, self.heads, x_SQD.shape[-1]), self.queries)

    def keys_first(self, x_MKD: Tensor) -> Tensor:
        x_RKTD = self._padded_rows(x_MKD, self.keys).transpose(1, 2)
        x_RKPTD = x_RKTD[:, :, None].expand(-1, -1, self.parts, -1, -1)
        return x_RKPTD.reshape(-1, self.keys.padded, x_MKD.shape[-1])

    def keys_last(self, x_STD: Tensor) -> Tensor:
        """The sum over parts, which is the gradient of what all of them share."""
        x_RKPTD = x_STD.view(len(self.lengths), self.kv_heads, self.parts, self.keys.padded, x_STD.shape[-1])
        x_RKTD = x_RKPTD[:, :, 0] if self.parts == 1 else x_RKPTD.sum(2)
        return self._real(x_RKTD.transpose(1, 2).reshape(-1, self.kv_heads, x_STD.shape[-1]), self.keys)

    def _padded_rows(self, x_NHD: Tensor, side: _Side) -> Tensor:
        """(R, T, H, D) with zeros behind each row."""
        if len(x_NHD) == len(self.lengths) * side.padded:
            return x_NHD.view(len(self.lengths), side.padded, *x_NHD.shape[1:])
        if len(self.lengths) == 1:
            return F.pad(x_NHD, (0, 0, 0, 0, 0, side.padded - len(x_NHD)))[None]
        out_LHD = x_NHD.new_zeros(len(self.lengths) * side.padded, *x_NHD.shape[1:])
        out_LHD.index_copy_(0, side.places.to(x_NHD.device), x_NHD)
        return out_LHD.view(len(self.lengths), side.padded, *x_NHD.shape[1:])

    def _real(self, x_LHD: Tensor, side: _Side) -> Tensor:
        """(N, H, D): what is no padding."""
        if len(self.lengths) == 1:
            return x_LHD[: len(side.places)]
        return x_LHD.index_select(0, side.places.to(x_LHD.device))

    def blocks(self) -> Iterator[tuple[slice, slice, slice]]:
        """Queries in stretches whose scores fit into the cache: (places in the row, matrix rows, keys they see)."""
        size = BLOCK_SCORES // (len(self.lengths) * self.heads * self.keys.padded)
        size = max(MULTIPLE, min(BLOCK_QUERIES.get(self.dtype, 128), size // MULTIPLE * MULTIPLE))
        for start in range(0, self.queries.padded, size):
            end = min(self.queries.padded, start + size)
            queries = slice(self.offset + start, self.offset + end)
            seen = self.sight.keys_of(queries, self.keys.padded)
            keys = slice(seen.start // MULTIPLE * MULTIPLE, min(self.keys.padded, _padded(seen.stop)))
            rows = (place // self.parts * self.shared for place in (start, end))
            yield queries, slice(*rows), keys

    def scores(self, q_SQD: Tensor, k_STD: Tensor, queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """(S, Q, keys) float32, masked; and the tanh of the capped scores where there is a cap.

        Queries and keys are in the wide type, though they hold numbers of the group's.
        """
        scores_SQT = wide_product(q_SQD, k_STD.transpose(1, 2), self.dtype)
        tanh_SQT = None
        if self.sight.softcap is not None:
            tanh_SQT = scores_SQT.div_(self.sight.softcap).tanh_()
            scores_SQT = tanh_SQT * self.sight.softcap
        # of a causal block without a window only its own columns differ, and alike in every block
        first = min(queries.start, keys.stop) if self.sight.causal and self.sight.window is None else keys.start
        lengths = None if self.sight.causal else tuple(length - first for length in self.lengths)
        stretch = (queries.start - first, queries.stop - first, keys.stop - first)
        bias_RPQT = _bias(self.sight, *stretch, lengths, self.shared, self.parts, q_SQD.device)
        if bias_RPQT is not None:
            by_row = scores_SQT.view(len(self.lengths), self.kv_heads, self.parts, *scores_SQT.shape[1:])
            by_row[..., first - keys.start :].add_(bias_RPQT[:, None])
        return scores_SQT, tanh_SQT


def _groups_of(query_NHD: Tensor, key_MKD: Tensor, rows: Rows, sight: Sight) -> list[tuple[slice, slice, _Group]]:
    return _groups(rows.lengths, rows.prefix, query_NHD.shape[1], key_MKD.shape[1], query_NHD.dtype, sight)


@lru_cache(maxsize=8)  # the same in every layer
def _groups(
    lengths: tuple[int, ...], prefix: int, heads: int, kv_heads: int, dtype: torch.dtype, sight: Sight
) -> list[tuple[slice, slice, _Group]]:
    """Every row in one group, with the stretches of queries and of keys that the group holds."""
    offsets = [0 if number == 0 else prefix for number in range(len(lengths))]
    together: list[list[int]] = []  # rows by their numbers
    for number, length in enumerate(lengths):
        like = together[-1][0] if together else number
        alike = _padded(lengths[like]) == _padded(length) and offsets[like] == offsets[number]
        alone = sight.window is not None and not sight.causal  # padding would see nothing at all
        scores = heads * min(_padded(length), 64) * _padded(offsets[number] + _padded(length))
        if together and alike and not alone and (len(together[-1]) + 1) * scores <= BLOCK_SCORES:
            together[-1].append(number)
        else:
            together.append([number])
    found, query, key = [], 0, 0
    for numbers in together:
        own, offset = [lengths[number] for number in numbers], offsets[numbers[0]]
        queries = _Side.of(own, _padded(own[0]))
        keys = _Side.of([offset + length for length in own], _padded(offset + queries.padded))
        parts = _parts(len(own) * kv_heads, dtype)
        group = _Group(tuple(own), offset, heads, kv_heads, parts, dtype, sight, queries, keys)
        ends = query + len(queries.places), key + len(keys.places)
        found.append((slice(query, ends[0]), slice(key, ends[1]), group))
        query, key = ends
    return found


def _parts(matrices: int, dtype: torch.dtype) -> int:
    """Two, where an odd number of products would leave every other thread without one.

    The library deals whole products out to threads, of float32 ones; those of two bytes it cuts up by itself.
    """
    return 2 if matrices % 2 and dtype.itemsize > 2 and torch.get_num_threads() % 2 == 0 else 1


def _padded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


@lru_cache(maxsize=64)  # the same few blocks in every layer
def _bias(
    sight: Sight,
    first: int,
    last: int,
    keys: int,
    lengths: tuple[int, ...] | None,
    group: int,
    parts: int,
    device: torch.device,
) -> Tensor | None:
    """(1 or rows, P, Q, keys): minus infinity where a query does not see a key, or the key is padding; None if nowhere.

    ``lengths`` are given where a query may see what comes after it, and so padding.
    """
    hidden = sight.hidden(slice(first, last), slice(0, keys), device)
    if lengths is not None and min(lengths) < keys:
        ends = torch.tensor(lengths, device=device)[:, None, None]
        hidden_RQT = (torch.arange(keys, device=device) >= ends).expand(-1, last - first, -1)
        hidden_RQT = hidden_RQT if hidden is None else hidden_RQT | hidden
        # padding among the queries sees all: without anything to see, it would be NaN
        hidden_RQT = hidden_RQT & (torch.arange(first, last, device=device)[:, None] < ends)
    elif hidden is not None:
        hidden_RQT = hidden[None]
    else:
        return None
    bias_RQT = torch.zeros(hidden_RQT.shape, device=device).masked_fill_(hidden_RQT, INFINITE)
    return bias_RQT.unflatten(1, (-1, parts)).transpose(1, 2).repeat_interleave(group, 2)


def _forward(q_NHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, group: _Group) -> tuple[Tensor, list[Tensor]]:
    """The output, and the probabilities of each block, in the inputs' type."""
    q_SQD, k_STD = wide(group.queries_first(q_NHD * group.sight.scaling)), wide(group.keys_first(k_MKD))
    v_STD = group.keys_first(v_MKD)
    out_SQD = v_STD.new_empty(*q_SQD.shape[:2], v_STD.shape[2])
    probabilities = []
    for queries, grouped, keys in group.blocks():
        scores_SQT, _ = group.scores(q_SQD[:, grouped], k_STD[:, keys], queries, keys)
        p_SQT = torch.softmax(scores_SQT, -1).to(v_STD.dtype)
        out_SQD[:, grouped] = torch.bmm(p_SQT, v_STD[:, keys])
        probabilities.append(p_SQT)
    return group.queries_last(out_SQD), probabilities


def _backward(
    q_NHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, do_NHD: Tensor, group: _Group, kept: Iterator[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. With P = softmax(S): dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)).

    Queries that are padding have dO = 0, and so add nothing anywhere.
    """
    q_SQD, do_SQD = (group.queries_first(t) for t in (q_NHD * group.sight.scaling, do_NHD))
    k_STD, v_STD = (group.keys_first(t) for t in (k_MKD, v_MKD))
    wide_q, wide_k = (q_SQD, k_STD) if group.keeps_probabilities else (wide(q_SQD), wide(k_STD))
    dq_SQD = torch.empty_like(q_SQD)
    dk_STD, dv_STD = (torch.zeros_like(t, dtype=wide_type(t.dtype)) for t in (k_STD, v_STD))
    for queries, grouped, keys in group.blocks():
        q, do, k, v = q_SQD[:, grouped], do_SQD[:, grouped], k_STD[:, keys], v_STD[:, keys]
        tanh_SQT = None
        if group.keeps_probabilities:
            p_SQT = next(kept)
        else:
            scores_SQT, tanh_SQT = group.scores(wide_q[:, grouped], wide_k[:, keys], queries, keys)
            p_SQT = torch.softmax(scores_SQT, -1).to(q.dtype)
        dv_STD[:, keys] += torch.bmm(p_SQT.transpose(1, 2), do)
        dp_SQT = torch.bmm(do, v.transpose(1, 2))
        ds_SQT = torch._softmax_backward_data(dp_SQT, p_SQT, -1, p_SQT.dtype)
        if tanh_SQT is not None:
            ds_SQT.mul_(1 - tanh_SQT.square())
        dq_SQD[:, grouped] = torch.bmm(ds_SQT, k)
        dk_STD[:, keys] += torch.bmm(ds_SQT.transpose(1, 2), q)
    dq_NHD = group.queries_last(dq_SQD) * group.sight.scaling
    dk_MKD, dv_MKD = (group.keys_last(t).to(k_MKD.dtype) for t in (dk_STD, dv_STD))
    return dq_NHD, dk_MKD, dv_MKD
