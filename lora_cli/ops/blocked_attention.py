"""Attention on the CPU: blocks of queries as batched matrix products, which keep no probabilities.

The backward pass makes them again (arXiv:2205.14135, algorithm 4, without its running maximum: a block sees all
of its keys at once). Scores are float32; all else is computed in the inputs' type.

Shape suffixes: N queries and M keys of all rows, H query heads, K key-value heads, G = H / K, D head size; inside
a group R rows, S = R K, T keys with padding, Q a block of queries times G.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_cli.ops.precision import wide_product, wide_type
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import INFINITE, Sight

BLOCK_SCORES = 2**19  # float32 scores of a block of queries: few enough to stay in a core's cache
BLOCK_QUERIES = {torch.float32: 64}  # measured best; the faster products of two-byte types like 128
MULTIPLE = 32  # rows are padded to this inside: products of odd sizes take up to twice as long


def attend_in_blocks(query_NHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, rows: Rows, sight: Sight) -> Tensor:
    """(N, H, D). Keys and values are those of ``rows.key_lengths``: each row's own, behind the shared prefix."""
    return _BlockedAttention.apply(query_NHD, key_MKD, value_MKD, rows, sight)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_NHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, rows: Rows, sight: Sight) -> Tensor:
        out_NHD = query_NHD.new_empty(*query_NHD.shape[:2], value_MKD.shape[2])
        groups = _groups(rows.lengths, rows.prefix, query_NHD.shape[1], key_MKD.shape[1], sight)
        for some, keys, group in rows.in_turn(groups):
            out_NHD[some] = _forward(query_NHD[some], key_MKD[keys], value_MKD[keys], group)
        ctx.rows, ctx.sight = rows, sight
        ctx.save_for_backward(query_NHD, key_MKD, value_MKD)
        return out_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHD: Tensor) -> tuple[Any, ...]:
        query_NHD, key_MKD, value_MKD = ctx.saved_tensors
        dq_NHD, dk_MKD, dv_MKD = (torch.empty_like(t) for t in (query_NHD, key_MKD, value_MKD))
        heads, kv_heads = query_NHD.shape[1], key_MKD.shape[1]
        groups = _groups(ctx.rows.lengths, ctx.rows.prefix, heads, kv_heads, ctx.sight)
        for some, keys, group in ctx.rows.in_turn(groups):
            dq_NHD[some], dk_MKD[keys], dv_MKD[keys] = _backward(
                query_NHD[some], key_MKD[keys], value_MKD[keys], gradient_NHD[some], group
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

    A tensor "heads first" is (S * K, T * G, D): for each of the S rows and each key head one matrix, with the
    queries of all heads that share this key head, padded with zeros to a length that products like.
    """

    lengths: tuple[int, ...]  # of the rows' queries
    offset: int  # keys that come before the rows' own: those of a shared prefix
    heads: int
    kv_heads: int
    sight: Sight
    queries: _Side
    keys: _Side

    @property
    def shared(self) -> int:
        """Query heads to a key head."""
        return self.heads // self.kv_heads

    def heads_first(self, x_NHD: Tensor, side: _Side) -> Tensor:
        heads, size = x_NHD.shape[1:]
        shape = (self.kv_heads, heads // self.kv_heads, size)
        if len(self.lengths) == 1:
            out_KTGD = x_NHD.new_zeros(self.kv_heads, side.padded, *shape[1:])
            out_KTGD[:, : len(x_NHD)] = x_NHD.view(-1, *shape).transpose(0, 1)
            return out_KTGD.flatten(1, 2)
        out_LHD = x_NHD.new_zeros(len(self.lengths) * side.padded, heads, size)
        out_LHD.index_copy_(0, side.places.to(x_NHD.device), x_NHD)
        return out_LHD.view(-1, side.padded, *shape).transpose(1, 2).reshape(-1, side.padded * shape[1], size)

    def tokens_first(self, x_SQD: Tensor, side: _Side) -> Tensor:
        """The inverse of ``heads_first``."""
        group, size = x_SQD.shape[1] // side.padded, x_SQD.shape[2]
        x_RTKGD = x_SQD.view(len(self.lengths), self.kv_heads, side.padded, group, size).transpose(1, 2)
        if len(self.lengths) == 1:
            return x_RTKGD[0, : len(side.places)].flatten(1, 2)
        return x_RTKGD.reshape(-1, self.kv_heads * group, size).index_select(0, side.places.to(x_SQD.device))

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, slice, slice]]:
        """Queries in stretches whose scores fit into the cache: (places in the row, matrix rows, keys they see)."""
        size = BLOCK_SCORES // (len(self.lengths) * self.heads * self.keys.padded)
        size = max(MULTIPLE, min(BLOCK_QUERIES.get(dtype, 128), size // MULTIPLE * MULTIPLE))
        for start in range(0, self.queries.padded, size):
            end = min(self.queries.padded, start + size)
            queries = slice(self.offset + start, self.offset + end)
            seen = self.sight.keys_of(queries, self.keys.padded)
            keys = slice(seen.start // MULTIPLE * MULTIPLE, min(self.keys.padded, _padded(seen.stop)))
            yield queries, slice(start * self.shared, end * self.shared), keys

    def scores(self, q_SQD: Tensor, k_STD: Tensor, queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """(S * K, Q, keys) float32, masked; and the tanh of the capped scores where there is a cap."""
        scores_SQT = wide_product(q_SQD, k_STD.transpose(1, 2))
        tanh_SQT = None
        if self.sight.softcap is not None:
            tanh_SQT = scores_SQT.div_(self.sight.softcap).tanh_()
            scores_SQT = tanh_SQT * self.sight.softcap
        # of a causal block without a window only its own columns differ, and alike in every block
        first = min(queries.start, keys.stop) if self.sight.causal and self.sight.window is None else keys.start
        lengths = None if self.sight.causal else tuple(length - first for length in self.lengths)
        stretch = (queries.start - first, queries.stop - first, keys.stop - first)
        bias_RQT = _bias(self.sight, *stretch, lengths, self.shared, q_SQD.device)
        if bias_RQT is not None:
            by_row = scores_SQT.view(len(self.lengths), self.kv_heads, *scores_SQT.shape[1:])
            by_row[..., first - keys.start :].add_(bias_RQT[:, None])
        return scores_SQT, tanh_SQT


@lru_cache(maxsize=8)  # the same in every layer
def _groups(
    lengths: tuple[int, ...], prefix: int, heads: int, kv_heads: int, sight: Sight
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
        group = _Group(tuple(own), offset, heads, kv_heads, sight, queries, keys)
        ends = query + len(queries.places), key + len(keys.places)
        found.append((slice(query, ends[0]), slice(key, ends[1]), group))
        query, key = ends
    return found


def _padded(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE


@lru_cache(maxsize=64)  # the same few blocks in every layer
def _bias(
    sight: Sight, first: int, last: int, keys: int, lengths: tuple[int, ...] | None, group: int, device: torch.device
) -> Tensor | None:
    """(1 or rows, Q, keys): minus infinity where a query does not see a key, or the key is padding; None if nowhere.

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
    return torch.zeros(hidden_RQT.shape, device=device).masked_fill_(hidden_RQT, INFINITE).repeat_interleave(group, 1)


def _forward(q_NHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, group: _Group) -> Tensor:
    q_SQD = group.heads_first(q_NHD * group.sight.scaling, group.queries)
    k_STD, v_STD = (group.heads_first(t, group.keys) for t in (k_MKD, v_MKD))
    outputs = []
    for queries, grouped, keys in group.blocks(q_NHD.dtype):
        scores_SQT, _ = group.scores(q_SQD[:, grouped], k_STD[:, keys], queries, keys)
        p_SQT = torch.softmax(scores_SQT, -1).to(v_STD.dtype)
        outputs.append(torch.bmm(p_SQT, v_STD[:, keys]))
    return group.tokens_first(torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], group.queries)


def _backward(
    q_NHD: Tensor, k_MKD: Tensor, v_MKD: Tensor, do_NHD: Tensor, group: _Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. With P = softmax(S): dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)).

    Queries that are padding have dO = 0, and so add nothing anywhere.
    """
    q_SQD, do_SQD = (group.heads_first(t, group.queries) for t in (q_NHD * group.sight.scaling, do_NHD))
    k_STD, v_STD = (group.heads_first(t, group.keys) for t in (k_MKD, v_MKD))
    dq_SQD = torch.empty_like(q_SQD)
    dk_STD, dv_STD = (torch.zeros_like(t, dtype=wide_type(t.dtype)) for t in (k_STD, v_STD))
    for queries, grouped, keys in group.blocks(q_NHD.dtype):
        q, do, k, v = q_SQD[:, grouped], do_SQD[:, grouped], k_STD[:, keys], v_STD[:, keys]
        scores_SQT, tanh_SQT = group.scores(q, k, queries, keys)
        p_SQT = torch.softmax(scores_SQT, -1).to(q.dtype)
        dv_STD[:, keys] += torch.bmm(p_SQT.transpose(1, 2), do)
        dp_SQT = torch.bmm(do, v.transpose(1, 2))
        ds_SQT = torch._softmax_backward_data(dp_SQT, p_SQT, -1, p_SQT.dtype)
        if tanh_SQT is not None:
            ds_SQT.mul_(1 - tanh_SQT.square())
        dq_SQD[:, grouped] = torch.bmm(ds_SQT, k)
        dk_STD[:, keys] += torch.bmm(ds_SQT.transpose(1, 2), q)
    dq_NHD = group.tokens_first(dq_SQD, group.queries) * group.sight.scaling
    dk_MKD, dv_MKD = (group.tokens_first(t, group.keys).to(k_MKD.dtype) for t in (dk_STD, dv_STD))
    return dq_NHD, dk_MKD, dv_MKD
