"""Attention among the tokens of each row, for rows laid end to end.

    o_t = sum_u softmax_u(s q_t . k_u) v_u       over the u that t may see      arXiv:1706.03762, eq. 1

Scores are float32 whatever the inputs are. Three ways, chosen by ``attend_rows``: on CUDA flash attention over
variable lengths; on the CPU blocks of queries as batched matrix products, which keep no probabilities for the
backward pass; and row by row with torch's own kernel for what those two cannot do (dropout, float32 on CUDA).

Shape suffixes: N tokens of all rows, H query heads, K key-value heads, G = H / K, D head size; inside the blocked
way R rows that are computed together, S = R K, T their tokens with padding, Q a block of queries times G.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_cli.ops.precision import wide, wide_type
from lora_cli.ops.rows import Rows

BLOCK_SCORES = 2**19  # float32 scores of a block of queries: few enough to stay in a core's cache
BLOCK_QUERIES = {torch.float32: 64}  # measured best; the faster products of two-byte types like 128
KEY_MULTIPLE = 32  # rows are padded to this inside: products of odd sizes take up to twice as long
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


def attend_rows(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, rows: Rows, sight: Sight, dropout: float = 0.0
) -> Tensor:
    """(N, H, D): each token attends within its own row."""
    if dropout == 0.0 and query_NHD.device.type == "cpu":
        return _BlockedAttention.apply(query_NHD, key_NKD, value_NKD, rows, sight)
    if dropout == 0.0 and sight.softcap is None and query_NHD.is_cuda and query_NHD.dtype.itemsize == 2:
        return _flash(query_NHD, key_NKD, value_NKD, rows, sight)
    return _row_by_row(query_NHD, key_NKD, value_NKD, rows, sight, dropout)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, rows: Rows, sight: Sight) -> Tensor:
        out_NHD = query_NHD.new_empty(*query_NHD.shape[:2], value_NKD.shape[2])
        for some, group in _groups(rows.lengths, query_NHD.shape[1], key_NKD.shape[1], sight):
            out_NHD[some] = _forward(query_NHD[some], key_NKD[some], value_NKD[some], group)
        ctx.rows, ctx.sight = rows, sight
        ctx.save_for_backward(query_NHD, key_NKD, value_NKD)
        return out_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHD: Tensor) -> tuple[Any, ...]:
        query_NHD, key_NKD, value_NKD = ctx.saved_tensors
        dq_NHD, dk_NKD, dv_NKD = (torch.empty_like(t) for t in (query_NHD, key_NKD, value_NKD))
        for some, group in _groups(ctx.rows.lengths, query_NHD.shape[1], key_NKD.shape[1], ctx.sight):
            dq_NHD[some], dk_NKD[some], dv_NKD[some] = _backward(
                query_NHD[some], key_NKD[some], value_NKD[some], gradient_NHD[some], group
            )
        return dq_NHD, dk_NKD, dv_NKD, None, None


@dataclass(frozen=True)
class _Group:
    """Neighbouring rows that are padded to one length inside, so that they share their products.

    A tensor "heads first" is (S * K, T * G, D): for each of the S rows and each key head one matrix, with the
    queries of all heads that share this key head, padded with zeros to a length that products like.
    """

    lengths: tuple[int, ...]
    padded: int
    heads: int
    kv_heads: int
    sight: Sight
    places: Tensor  # (N,) int64: where the rows' tokens lie among S * T

    def heads_first(self, x_NHD: Tensor) -> Tensor:
        heads, size = x_NHD.shape[1:]
        shape = (self.kv_heads, heads // self.kv_heads, size)
        if len(self.lengths) == 1:
            out_KTGD = x_NHD.new_zeros(self.kv_heads, self.padded, *shape[1:])
            out_KTGD[:, : len(x_NHD)] = x_NHD.view(-1, *shape).transpose(0, 1)
            return out_KTGD.flatten(1, 2)
        out_MHD = x_NHD.new_zeros(len(self.lengths) * self.padded, heads, size)
        out_MHD.index_copy_(0, self.places, x_NHD)
        return out_MHD.view(-1, self.padded, *shape).transpose(1, 2).reshape(-1, self.padded * shape[1], size)

    def tokens_first(self, x_SQD: Tensor) -> Tensor:
        """The inverse of ``heads_first``."""
        group, size = x_SQD.shape[1] // self.padded, x_SQD.shape[2]
        x_RTKGD = x_SQD.view(len(self.lengths), self.kv_heads, self.padded, group, size).transpose(1, 2)
        if len(self.lengths) == 1:
            return x_RTKGD[0, : self.lengths[0]].flatten(1, 2)
        return x_RTKGD.reshape(-1, self.kv_heads * group, size).index_select(0, self.places)

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, slice, slice]]:
        """Queries in stretches whose scores fit into the cache: (queries, queries times G, the keys they see)."""
        size = min(BLOCK_QUERIES.get(dtype, 128), BLOCK_SCORES // (len(self.lengths) * self.heads * self.padded))
        size = max(KEY_MULTIPLE, size // KEY_MULTIPLE * KEY_MULTIPLE)
        group = self.heads // self.kv_heads
        for start in range(0, self.padded, size):
            end = min(self.padded, start + size)
            keys = self.sight.keys_of(slice(start, end), self.padded)
            yield slice(start, end), slice(start * group, end * group), keys

    def scores(self, q_SQD: Tensor, k_STD: Tensor, queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """(S * K, Q, keys) float32, masked; and the tanh of the capped scores where there is a cap."""
        scores_SQT = torch.bmm(wide(q_SQD), wide(k_STD).transpose(1, 2))
        tanh_SQT = None
        if self.sight.softcap is not None:
            tanh_SQT = scores_SQT.div_(self.sight.softcap).tanh_()
            scores_SQT = tanh_SQT * self.sight.softcap
        # of a causal block without a window only its own columns differ, and alike in every block
        first = queries.start if self.sight.causal and self.sight.window is None else keys.start
        lengths = None if self.sight.causal else tuple(length - first for length in self.lengths)
        group, stretch = self.heads // self.kv_heads, (queries.start - first, queries.stop - first, keys.stop - first)
        bias_RQT = _bias(self.sight, *stretch, lengths, group, q_SQD.device)
        if bias_RQT is not None:
            by_row = scores_SQT.view(len(self.lengths), self.kv_heads, *scores_SQT.shape[1:])
            by_row[..., first - keys.start :].add_(bias_RQT[:, None])
        return scores_SQT, tanh_SQT


@lru_cache(maxsize=8)  # the same in every layer
def _groups(lengths: tuple[int, ...], heads: int, kv_heads: int, sight: Sight) -> list[tuple[slice, _Group]]:
    """Every row in one group, with the tokens that the group holds."""
    together: list[list[int]] = []
    for length in lengths:
        group = together[-1] if together else []
        padded = _padded(length)
        alone = sight.window is not None and not sight.causal  # padding would see nothing at all
        fits = (len(group) + 1) * heads * padded * min(padded, 64) <= BLOCK_SCORES
        if group and _padded(group[0]) == padded and fits and not alone:
            group.append(length)
        else:
            together.append([length])
    found, start = [], 0
    for group in together:
        padded, end = _padded(group[0]), start + sum(group)
        places = torch.cat([torch.arange(length) + number * padded for number, length in enumerate(group)])
        found.append((slice(start, end), _Group(tuple(group), padded, heads, kv_heads, sight, places)))
        start = end
    return found


def _padded(length: int) -> int:
    return -(-length // KEY_MULTIPLE) * KEY_MULTIPLE


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


def _forward(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, group: _Group) -> Tensor:
    q_SQD = group.heads_first(q_NHD * group.sight.scaling)
    k_STD, v_STD = group.heads_first(k_NKD), group.heads_first(v_NKD)
    outputs = []
    for queries, grouped, keys in group.blocks(q_NHD.dtype):
        scores_SQT, _ = group.scores(q_SQD[:, grouped], k_STD[:, keys], queries, keys)
        p_SQT = torch.softmax(scores_SQT, -1).to(v_STD.dtype)
        outputs.append(torch.bmm(p_SQT, v_STD[:, keys]))
    return group.tokens_first(torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0])


def _backward(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, do_NHD: Tensor, group: _Group
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. With P = softmax(S): dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)).

    Queries that are padding have dO = 0, and so add nothing anywhere.
    """
    q_SQD, do_SQD = group.heads_first(q_NHD * group.sight.scaling), group.heads_first(do_NHD)
    k_STD, v_STD = group.heads_first(k_NKD), group.heads_first(v_NKD)
    dq_SQD = torch.empty_like(q_SQD)
    dk_STD, dv_STD = (torch.zeros(t.shape, dtype=wide_type(t.dtype)) for t in (k_STD, v_STD))
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
    dq_NHD = group.tokens_first(dq_SQD) * group.sight.scaling
    return dq_NHD, group.tokens_first(dk_STD).to(k_NKD.dtype), group.tokens_first(dv_STD).to(v_NKD.dtype)


@cache
def _varlen_parameters() -> frozenset[str]:
    """What this torch's varlen_attn takes: 2.10 has is_causal and no scale, 2.12 has enable_gqa."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _flash(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, rows: Rows, sight: Sight) -> Tensor:
    """Flash attention over variable lengths (arXiv:2307.08691), as torch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters()
    options: dict[str, Any] = {}
    if "window_size" not in known and sight.window is not None:
        return _row_by_row(query_NHD, key_NKD, value_NKD, rows, sight, 0.0)
    if "window_size" in known:
        left = -1 if sight.window is None else sight.window - 1
        options["window_size"] = (left, 0 if sight.causal else left)
    else:
        options["is_causal"] = sight.causal
    if "scale" in known:
        options["scale"] = sight.scaling
    else:  # it divides by sqrt(D)
        query_NHD = query_NHD * (sight.scaling * math.sqrt(query_NHD.shape[-1]))
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        group = query_NHD.shape[1] // key_NKD.shape[1]
        key_NKD, value_NKD = (t.repeat_interleave(group, 1) for t in (key_NKD, value_NKD))
    bounds, longest = rows.bounds, rows.longest
    out_NHD: Any = varlen_attn(query_NHD, key_NKD, value_NKD, bounds, bounds, longest, longest, **options)
    return out_NHD


def _row_by_row(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, rows: Rows, sight: Sight, dropout: float
) -> Tensor:
    outputs = []
    for row in rows.slices():
        q_HTD, k_KTD, v_KTD = (t[row].transpose(0, 1) for t in (query_NHD, key_NKD, value_NKD))
        outputs.append(_one_row(q_HTD, k_KTD, v_KTD, sight, dropout).transpose(0, 1))
    return torch.cat(outputs)


def _one_row(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, sight: Sight, dropout: float) -> Tensor:
    length = q_HTD.shape[1]
    hidden = sight.hidden(slice(0, length), slice(0, length), q_HTD.device) if sight.window is not None else None
    if sight.softcap is None:
        return F.scaled_dot_product_attention(
            q_HTD[None],
            k_KTD[None],
            v_KTD[None],
            attn_mask=None if hidden is None else ~hidden,
            is_causal=sight.causal and hidden is None,
            scale=sight.scaling,
            dropout_p=dropout,
            enable_gqa=True,
        )[0]
    hidden = sight.hidden(slice(0, length), slice(0, length), q_HTD.device)
    group = q_HTD.shape[0] // k_KTD.shape[0]
    k_HTD, v_HTD = (t.repeat_interleave(group, 0) for t in (k_KTD, v_KTD))
    scores_HTT = wide(sight.softcap * torch.tanh((q_HTD * sight.scaling) @ k_HTD.transpose(1, 2) / sight.softcap))
    if hidden is not None:
        scores_HTT = scores_HTT.masked_fill(hidden, INFINITE)
    p_HTT = torch.dropout(torch.softmax(scores_HTT, -1).to(v_HTD.dtype), dropout, dropout > 0)
    return p_HTT @ v_HTD
