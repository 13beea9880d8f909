"""Attention among the tokens of each row, for rows laid end to end.

    o_t = sum_u softmax_u(s q_t . k_u) v_u       over the u that t may see      arXiv:1706.03762, eq. 1

Three ways, chosen by ``attend_rows``: on CUDA flash attention over variable lengths; on the CPU blocks of queries
(``blocked_attention``); and row by row with torch's own kernel for what flash attention cannot do (dropout, a soft
cap, float32).

Shape suffixes: N tokens of all rows, M keys that they see, H query heads, K key-value heads, D head size, T tokens or
keys of one row.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.ops.blocked_attention import attend_in_blocks
from lora_cli.ops.precision import wide
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import INFINITE, Sight


def attend_rows(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, rows: Rows, sight: Sight, dropout: float = 0.0
) -> Tensor:
    """(N, H, D): each token attends within its own row, and to the prefix that it shares with others."""
    key_MKD, value_MKD = rows.source(rows, key_NKD, value_NKD)
    device = rows.stands_for or query_NHD.device.type
    if device == "cpu":
        return attend_in_blocks(query_NHD, key_MKD, value_MKD, rows, sight, dropout)
    if dropout == 0.0 and sight.softcap is None and device == "cuda" and query_NHD.dtype.itemsize == 2:
        return _flash(query_NHD, key_MKD, value_MKD, rows, sight)
    return _row_by_row(query_NHD, key_MKD, value_MKD, rows, sight, dropout)


@cache
def _varlen_parameters() -> frozenset[str]:
    """What this torch's varlen_attn takes: 2.10 has is_causal and no scale, 2.12 has enable_gqa."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


@cache
def _shares_keys_by_itself(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether query heads share keys without being told to: torch 2.11 has no word for it, and the library below may.

    Tried once, there and back, since copies of keys and values would be kept in every layer.
    """
    if device.type == "meta":
        return False
    from torch.nn.attention.varlen import varlen_attn

    chance = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, heads, 32, generator=chance).to(device, dtype).requires_grad_() for heads in (4, 2, 2)]
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32).to(device)

    def results(copies: int) -> list[Tensor]:
        query, key, value = inputs
        key, value = (t.repeat_interleave(copies, 1) for t in (key, value))
        out: Any = varlen_attn(query, key, value, bounds, bounds, 3, 3, window_size=(-1, 0))
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    try:
        with torch.enable_grad():
            return all(torch.allclose(a, b, 0.05, 0.05) for a, b in zip(results(1), results(2), strict=True))
    except Exception:  # whatever it raises for keys of fewer heads
        return False


def _flash(query_NHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, rows: Rows, sight: Sight) -> Tensor:
    """Flash attention over variable lengths (arXiv:2307.08691), as torch ships it."""
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters()
    options: dict[str, Any] = {}
    if sight.window is not None and ("window_size" not in known or not rows.end_with_their_keys):
        return _row_by_row(query_NHD, key_MKD, value_MKD, rows, sight, 0.0)
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
    elif "window_size" not in known or not _shares_keys_by_itself(query_NHD.device, query_NHD.dtype):
        group = query_NHD.shape[1] // key_MKD.shape[1]
        key_MKD, value_MKD = (t.repeat_interleave(group, 1) for t in (key_MKD, value_MKD))
    ends, most = (rows.bounds, rows.key_bounds), (rows.longest, max(rows.key_lengths))
    out_NHD: Any = varlen_attn(query_NHD, key_MKD, value_MKD, *ends, *most, **options)
    return out_NHD


def _row_by_row(
    query_NHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, rows: Rows, sight: Sight, dropout: float
) -> Tensor:
    outputs = []
    for row, keys, offset in zip(rows.slices(), rows.key_slices(), rows.offsets, strict=True):
        q_HTD, k_KTD, v_KTD = (t.transpose(0, 1) for t in (query_NHD[row], key_MKD[keys], value_MKD[keys]))
        outputs.append(_one_row(q_HTD, k_KTD, v_KTD, offset, sight, dropout).transpose(0, 1))
    return torch.cat(outputs)


def _one_row(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, offset: int, sight: Sight, dropout: float) -> Tensor:
    queries, keys = slice(offset, offset + q_HTD.shape[1]), slice(0, k_KTD.shape[1])
    plain = sight.window is None and queries.start == 0 and sight.softcap is None  # torch masks by itself then
    hidden = None if plain else sight.hidden(queries, keys, q_HTD.device)
    if sight.softcap is None:
        return F.scaled_dot_product_attention(
            q_HTD[None],
            k_KTD[None],
            v_KTD[None],
            attn_mask=None if hidden is None else ~hidden,
            is_causal=sight.causal and plain,
            scale=sight.scaling,
            dropout_p=dropout,
            enable_gqa=True,
        )[0]
    group = q_HTD.shape[0] // k_KTD.shape[0]
    k_HTD, v_HTD = (t.repeat_interleave(group, 0) for t in (k_KTD, v_KTD))
    scores_HTT = wide(sight.softcap * torch.tanh((q_HTD * sight.scaling) @ k_HTD.transpose(1, 2) / sight.softcap))
    if hidden is not None:
        scores_HTT = scores_HTT.masked_fill(hidden, INFINITE)
    p_HTT = torch.dropout(torch.softmax(scores_HTT, -1).to(v_HTD.dtype), dropout, dropout > 0)
    return p_HTT @ v_HTD
