"""Attention among the tokens of each row, for rows laid end to end.

    o_t = sum_u softmax_u(s q_t . k_u) v_u       over the u that t may see      arXiv:1706.03762, eq. 1

Scores are float32 whatever the inputs are. Three ways, chosen by ``attend_rows``: on CUDA flash attention over
variable lengths; on the CPU blocks of queries as batched matrix products, which keep no probabilities for the
backward pass; and row by row with torch's own kernel for what those two cannot do (dropout, float32 on CUDA).

Shape suffixes: N tokens of all rows, H query heads, K key-value heads, G = H / K, D head size; inside one
row T its tokens, and Q a block of its queries times G.
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
    window: int | None = None  # causal: itself and the window - 1 before it; else up to this far to both sides
    softcap: float | None = None  # scores become softcap * tanh(score / softcap): Gemma 2, arXiv:2408.00118

    def hidden(self, queries: slice, keys: slice, device: torch.device) -> Tensor | None:
        """(queries, keys) bool: True where a query does not see a key; None where each sees all of them."""
        last, first = queries.stop - 1 - keys.start, queries.start - (keys.stop - 1)  # the extreme distances
        ahead = self.causal and first < 0
        far = self.window is not None and (last >= self.window + (not self.causal) or -first > self.window)
        if not ahead and not far:
            return None
        query_positions, key_positions = (torch.arange(s.start, s.stop, device=device) for s in (queries, keys))
        distance = query_positions[:, None] - key_positions
        if not self.causal:
            return distance.abs() > self.window
        return distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)

    def keys_of(self, queries: slice, length: int) -> slice:
        """The stretch of keys that some of these queries may see."""
        first = 0
        if self.window is not None:
            first = max(0, queries.start - self.window + (1 if self.causal else 0))
        last = queries.stop if self.causal else length
        if self.window is not None and not self.causal:
            last = min(length, queries.stop + self.window)
        return slice(first, last)


def attend_rows(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, rows: Rows, sight: Sight, dropout: float = 0.0
) -> Tensor:
    """(N, H, D): each token attends within its own row."""
    device = rows.stands_for or query_NHD.device.type
    if dropout == 0.0 and device == "cpu":
        return _BlockedAttention.apply(query_NHD, key_NKD, value_NKD, rows, sight)
    if dropout == 0.0 and sight.softcap is None and device == "cuda" and query_NHD.dtype.itemsize == 2:
        return _flash(query_NHD, key_NKD, value_NKD, rows, sight)
    return _row_by_row(query_NHD, key_NKD, value_NKD, rows, sight, dropout)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, rows: Rows, sight: Sight) -> Tensor:
        out_NHD = query_NHD.new_empty(*query_NHD.shape[:2], value_NKD.shape[2])
        for row in rows.in_turn():
            out_NHD[row] = _row_forward(query_NHD[row], key_NKD[row], value_NKD[row], sight)
        ctx.rows, ctx.sight = rows, sight
        ctx.save_for_backward(query_NHD, key_NKD, value_NKD)
        return out_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHD: Tensor) -> tuple[Any, ...]:
        query_NHD, key_NKD, value_NKD = ctx.saved_tensors
        dq_NHD, dk_NKD, dv_NKD = (torch.empty_like(t) for t in (query_NHD, key_NKD, value_NKD))
        for row in ctx.rows.in_turn():
            parts = (t[row] for t in (query_NHD, key_NKD, value_NKD, gradient_NHD))
            dq_NHD[row], dk_NKD[row], dv_NKD[row] = _row_backward(*parts, ctx.sight)
        return dq_NHD, dk_NKD, dv_NKD, None, None


@dataclass(frozen=True)
class _Row:
    """One row's queries, keys and values, heads first and padded with zeros to a length that products like."""

    length: int
    padded: int
    group: int  # query heads that share a key head
    sight: Sight

    @staticmethod
    def of(q_THD: Tensor, k_TKD: Tensor, sight: Sight) -> _Row:
        length = len(q_THD)
        return _Row(length, -(-length // KEY_MULTIPLE) * KEY_MULTIPLE, q_THD.shape[1] // k_TKD.shape[1], sight)

    def heads_first(self, x_THD: Tensor, group: int = 1) -> Tensor:
        """(T, H, D) -> (K, T * G, D): the queries that share a key head in one matrix."""
        length, heads, size = x_THD.shape
        out = x_THD.new_zeros(heads // group, self.padded, group, size)
        out[:, :length] = x_THD.view(length, heads // group, group, size).transpose(0, 1)
        return out.flatten(1, 2)

    def tokens_first(self, x_KQD: Tensor) -> Tensor:
        """The inverse of ``heads_first``."""
        kv_heads, queries, size = x_KQD.shape
        x_KTGD = x_KQD.view(kv_heads, self.padded, queries // self.padded, size)[:, : self.length]
        return x_KTGD.transpose(0, 1).flatten(1, 2)

    def blocks(self, heads: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, slice]]:
        """Queries in stretches whose scores fit into the cache: (queries, queries times G, the keys they see)."""
        size = min(BLOCK_QUERIES.get(dtype, 128), BLOCK_SCORES // (heads * self.padded))
        size = max(KEY_MULTIPLE, size // KEY_MULTIPLE * KEY_MULTIPLE)
        for start in range(0, self.padded, size):
            end = min(self.padded, start + size)
            yield (
                slice(start, end),
                slice(start * self.group, end * self.group),
                self.sight.keys_of(slice(start, end), self.padded),
            )

    def scores(self, q_KQD: Tensor, k_KTD: Tensor, queries: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """(K, Q, keys) float32, masked; and the tanh of the capped scores where there is a cap."""
        scores_KQT = torch.bmm(wide(q_KQD), wide(k_KTD).transpose(1, 2))
        tanh_KQT = None
        if self.sight.softcap is not None:
            tanh_KQT = scores_KQT.div_(self.sight.softcap).tanh_()
            scores_KQT = tanh_KQT * self.sight.softcap
        # of a causal block without a window only its own columns differ, and alike in every block
        first = queries.start if self.sight.causal and self.sight.window is None else keys.start
        length = None if self.sight.causal else self.length - first
        bias_QT = _bias(
            self.sight, queries.start - first, queries.stop - first, keys.stop - first, length, self.group, q_KQD.device
        )
        if bias_QT is not None:
            scores_KQT[..., first - keys.start :].add_(bias_QT)
        return scores_KQT, tanh_KQT


@lru_cache(maxsize=64)  # the same few blocks in every layer
def _bias(
    sight: Sight, first: int, last: int, keys: int, length: int | None, group: int, device: torch.device
) -> Tensor | None:
    """(Q, keys): minus infinity where a query does not see a key, or the key is padding; None where there is none."""
    hidden = sight.hidden(slice(first, last), slice(0, keys), device)
    if length is not None and length < keys:
        padding = (torch.arange(keys, device=device) >= length).expand(last - first, keys)
        hidden = padding if hidden is None else hidden | padding
        hidden = hidden & (torch.arange(first, last, device=device) < length)[:, None]  # padding sees all: no NaN
    if hidden is None:
        return None
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, INFINITE).repeat_interleave(group, 0)


def _row_forward(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, sight: Sight) -> Tensor:
    row = _Row.of(q_THD, k_TKD, sight)
    q_KQD = row.heads_first(q_THD * sight.scaling, row.group)
    k_KTD, v_KTD = row.heads_first(k_TKD), row.heads_first(v_TKD)
    outputs = []
    for queries, grouped, keys in row.blocks(q_THD.shape[1], q_THD.dtype):
        scores_KQT, _ = row.scores(q_KQD[:, grouped], k_KTD[:, keys], queries, keys)
        p_KQT = torch.softmax(scores_KQT, -1).to(v_KTD.dtype)
        outputs.append(torch.bmm(p_KQT, v_KTD[:, keys]))
    return row.tokens_first(torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0])


def _row_backward(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, do_THD: Tensor, sight: Sight
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. With P = softmax(S): dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)).

    Queries that are padding have dO = 0, and so add nothing anywhere.
    """
    row = _Row.of(q_THD, k_TKD, sight)
    q_KQD, do_KQD = row.heads_first(q_THD * sight.scaling, row.group), row.heads_first(do_THD, row.group)
    k_KTD, v_KTD = row.heads_first(k_TKD), row.heads_first(v_TKD)
    dq_KQD = torch.empty_like(q_KQD)
    dk_KTD, dv_KTD = (t.new_zeros(t.shape, dtype=wide_type(t.dtype)) for t in (k_KTD, v_KTD))
    for queries, grouped, keys in row.blocks(q_THD.shape[1], q_THD.dtype):
        q, do, k, v = q_KQD[:, grouped], do_KQD[:, grouped], k_KTD[:, keys], v_KTD[:, keys]
        scores_KQT, tanh_KQT = row.scores(q, k, queries, keys)
        p_KQT = torch.softmax(scores_KQT, -1).to(q.dtype)
        dv_KTD[:, keys] += torch.bmm(p_KQT.transpose(1, 2), do)
        dp_KQT = torch.bmm(do, v.transpose(1, 2))
        ds_KQT = torch._softmax_backward_data(dp_KQT, p_KQT, -1, p_KQT.dtype)
        if tanh_KQT is not None:
            ds_KQT.mul_(1 - tanh_KQT.square())
        dq_KQD[:, grouped] = torch.bmm(ds_KQT, k)
        dk_KTD[:, keys] += torch.bmm(ds_KQT.transpose(1, 2), q)
    dq_THD = row.tokens_first(dq_KQD) * sight.scaling
    return dq_THD, row.tokens_first(dk_KTD).to(k_TKD.dtype), row.tokens_first(dv_KTD).to(v_TKD.dtype)


@cache
def _varlen_parameters() -> frozenset[str]:
    """What this torch's varlen_attn takes: 2.10 has is_causal and no scale, 2.12 has enable_gqa."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _flash(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, rows: Rows, sight: Sight) -> Tensor:
    """Flash attention over variable lengths (arXiv:2307.08691), as torch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    known, options = _varlen_parameters(), {}
    if "window_size" not in known and sight.window is not None:
        return _row_by_row(query_NHD, key_NKD, value_NKD, rows, sight, 0.0)
    if "window_size" in known:
        left = -1 if sight.window is None else sight.window - (1 if sight.causal else 0)
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
    return varlen_attn(query_NHD, key_NKD, value_NKD, bounds, bounds, longest, longest, **options)


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
