"""Attention among the tokens of each row, for rows laid end to end.

    o_t = sum_u softmax_u(s q_t . k_u) v_u       over the u that t may see      arXiv:1706.03762, eq. 1

Four ways, chosen by ``attend_rows``: on CUDA flash attention over variable lengths, and ``flexible_attention`` for what
that has no word for; on the CPU, and for soft caps wherever else, tiles (``blocked_attention``); and row by row torch's
own kernel for the rest (dropout and float32 on a GPU).

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
from lora_cli.ops.flexible_attention import attend_flexibly, can_attend_flexibly
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import Sight


def attend_rows(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, rows: Rows, sight: Sight, dropout: float = 0.0
) -> Tensor:
    """(N, H, D): each token attends within its own row, and to the prefix that it shares with others."""
    key_MKD, value_MKD = rows.source(rows, key_NKD, value_NKD)
    device = rows.stands_for or query_NHD.device.type
    if device == "cuda" and dropout == 0.0 and query_NHD.dtype.itemsize == 2:
        if query_NHD.is_meta or _has_flash(rows, sight):  # on paper both keep the same
            return _flash(query_NHD, key_MKD, value_MKD, rows, sight)
        if can_attend_flexibly(query_NHD, key_MKD, sight):
            return attend_flexibly(query_NHD, key_MKD, value_MKD, rows, sight)
    if device == "cpu" or sight.softcap is not None:
        return attend_in_blocks(query_NHD, key_MKD, value_MKD, rows, sight, dropout)
    return _row_by_row(query_NHD, key_MKD, value_MKD, rows, sight, dropout)


def _has_flash(rows: Rows, sight: Sight) -> bool:
    """Whether flash attention can look at rows in this way; it takes the last query for that of the last key."""
    if sight.softcap is not None or (sight.window is not None and "window_size" not in _varlen_parameters()):
        return False
    return rows.end_with_their_keys or (sight.window is None and not sight.causal)


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
    plain = sight.window is None and queries.start == 0  # torch masks by itself then
    shares = plain and q_HTD.dtype.itemsize == 2  # of torch's kernels, only flash attention lets heads share keys
    group = 1 if shares else q_HTD.shape[0] // k_KTD.shape[0]
    k_HTD, v_HTD = (t.repeat_interleave(group, 0) if group > 1 else t for t in (k_KTD, v_KTD))
    hidden = None if plain else sight.hidden(queries, keys, q_HTD.device)
    return F.scaled_dot_product_attention(
        q_HTD[None],
        k_HTD[None],
        v_HTD[None],
        attn_mask=None if hidden is None else ~hidden,
        is_causal=sight.causal and plain,
        scale=sight.scaling,
        dropout_p=dropout,
        enable_gqa=shares,
    )[0]
