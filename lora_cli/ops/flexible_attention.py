"""Attention on CUDA with what flash attention has no word for: a cap on scores, windows that end before the keys do.

Kernels that torch's compiler makes from two small formulas, one for scores and one for who sees whom (flex attention,
arXiv:2412.05496). They save queries, keys, values, the output and a number for each query and head; scores never exist
as a whole.

Shape suffixes: N queries and M keys of all rows, H query heads, K key-value heads, D head size; P blocks of queries, Q
blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_cli.errors import first_line
from lora_cli.ops.blocked_attention import attend_in_blocks
from lora_cli.ops.kernels import Kernels, kernel
from lora_cli.ops.rows import Rows
from lora_cli.ops.sending import send
from lora_cli.ops.sight import Sight

BLOCK = 128  # queries, and keys, that are computed or skipped together
ONE_KERNEL = {"FORCE_USE_FLEX_ATTENTION": True}  # for lines of any length: what the trial has tried
EVERYTHING = 2**30  # a window that is wider than any row
TRIAL_LENGTHS = [5, 850]  # some blocks, and not a whole number of them
TOLERANCE = 0.05  # of two-byte types' roundings; a wrong kernel is off by more


def attend_flexibly(query_NHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, rows: Rows, sight: Sight) -> Tensor:
    """(N, H, D): as ``attend_in_blocks``, without dropout."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value = (x.transpose(0, 1)[None] for x in (query_NHD, key_MKD, value_MKD))
    options: dict[str, Any] = {"scale": sight.scaling, "enable_gqa": True, "kernel_options": ONE_KERNEL}
    if sight.softcap is not None:
        options["score_mod"] = _cap_at(sight.softcap, query_NHD.device)
    out_1HND = kernel(flex_attention, Kernels.COMPILED)(
        query, key, value, block_mask=block_mask(rows, sight), **options
    )
    return out_1HND[0].transpose(0, 1)


@lru_cache(maxsize=8)
def _cap_at(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    """The cap is a tensor: of numbers, a compiler of any sizes makes symbols, which this kernel cannot hold."""
    cap = send(torch.tensor(softcap), device)

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def can_attend_flexibly(query_NHD: Tensor, key_MKD: Tensor, sight: Sight) -> bool:
    """Whether such kernels can be made on this device, and are right there and back: tried once for each kind."""
    heads, kv_heads, size = query_NHD.shape[1], key_MKD.shape[1], query_NHD.shape[2]
    return _why_not(query_NHD.device, query_NHD.dtype, (heads, kv_heads, kv_heads), size, sight) is None


def reasons_against() -> list[str]:
    """Why trials failed, each told once."""
    told = list(dict.fromkeys(_UNTOLD))
    _UNTOLD.clear()
    return told


_UNTOLD: list[str] = []


@lru_cache(maxsize=32)
def _why_not(device: torch.device, dtype: torch.dtype, heads: tuple[int, ...], size: int, sight: Sight) -> str | None:
    reason = _tried(device, dtype, heads, size, sight)
    if reason is not None:
        _UNTOLD.append(reason)
    return reason


def _tried(device: torch.device, dtype: torch.dtype, heads: tuple[int, ...], size: int, sight: Sight) -> str | None:
    chance = torch.Generator().manual_seed(0)
    rows = Rows.of(TRIAL_LENGTHS).to(device)
    inputs = [torch.randn(rows.num_tokens, count, size, generator=chance) for count in heads]
    inputs = [x.to(device, dtype).requires_grad_() for x in inputs]

    def results(attend: Callable[..., Tensor]) -> list[Tensor]:
        out = attend(*inputs, rows, sight)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    try:
        with torch.enable_grad():
            pairs = zip(results(attend_flexibly), results(attend_in_blocks), strict=True)
            right = all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in pairs)
    except Exception as error:  # no compiler, a kernel that is too large for the card: each with exceptions of its own
        return first_line(error)
    return None if right else "it gives something else"


def block_mask(rows: Rows, sight: Sight) -> Any:
    """Who sees whom: torch's ``BlockMask``. The same in every layer, and made once for a batch."""
    window = EVERYTHING if sight.window is None else sight.window
    return _block_mask(rows.lengths, rows.key_lengths, rows.offsets, sight.causal, window, rows.bounds.device)


class _Line(NamedTuple):
    """Queries, or keys, of all rows: the row of each, and its place among its row's keys. int32 on the host."""

    row: Tensor
    place: Tensor

    def send(self, device: torch.device) -> _Line:
        return _Line(send(self.row, device), send(self.place, device))


def _line(lengths: tuple[int, ...], offsets: tuple[int, ...]) -> _Line:
    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.cat([torch.arange(at, at + length) for at, length in zip(offsets, lengths, strict=True)])
    return _Line(row.int(), place.int())


@lru_cache(maxsize=8)
def _block_mask(
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    offsets: tuple[int, ...],
    causal: bool,
    window: int,
    device: torch.device,
) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    queries, keys = _line(lengths, offsets), _line(key_lengths, (0,) * len(key_lengths))
    counts_P, blocks_PQ = _blocks_seen(queries, torch.tensor(key_lengths), causal, window)
    sees = _sees(queries.send(device), keys.send(device), causal, send(torch.tensor(window), device))
    return BlockMask.from_kv_blocks(
        send(counts_P[None, None], device),
        send(blocks_PQ[None, None], device),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(len(queries.row), len(keys.row)),
    )


def _sees(queries: _Line, keys: _Line, causal: bool, window: Tensor) -> Callable[..., Tensor]:
    """The window is a tensor, so that layers with and without one share a kernel."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = queries.place[query] - keys.place[key]
        near = (queries.row[query] == keys.row[key]) & (distance.abs() < window)
        return near & (distance >= 0) if causal else near

    return sees


def _blocks_seen(queries: _Line, key_lengths: Tensor, causal: bool, window: int) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries looks at (P,), and which (P, Q): one stretch, int32.

    Found on the host from where rows begin and end; a mask of all pairs would be large, and take the device's time.
    """
    first_keys = key_lengths.cumsum(0) - key_lengths
    row, place = queries.row.long(), queries.place.long()
    last = place if causal else torch.minimum(place + window - 1, key_lengths[row] - 1)
    first_N = first_keys[row] + (place - window + 1).clamp_min(0)
    last_N = first_keys[row] + last
    first_P = torch.stack([part.min() for part in first_N.split(BLOCK)]) // BLOCK
    last_P = torch.stack([part.max() for part in last_N.split(BLOCK)]) // BLOCK
    width = -(-int(key_lengths.sum()) // BLOCK)
    blocks_PQ = (first_P[:, None] + torch.arange(width)).clamp_max(width - 1)
    return (last_P - first_P + 1).int(), blocks_PQ.int()
