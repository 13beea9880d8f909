"""Attention on the CPU, and with soft caps elsewhere: tiles of queries and keys as batched matrix products.

Of short rows the probabilities are kept for the backward pass: measured, in bfloat16 6 % of a step's time for 9 % of
its memory, in float32 2 % for 9 %. Of longer ones they are made again there (arXiv:2205.14135, algorithm 4, without its
running maximum: a query sees all of its keys at once). Scores are float32; all else is computed in the inputs' type.

Shape suffixes: N queries and M keys of all rows, H query heads, K key-value heads, D head size; L queries and F keys of
all tiles, with padding; in a tile S matrices, Q queries times H / K, T keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_cli.ops.dropout import draw_mask, masked, scale_of
from lora_cli.ops.precision import wide_product, wide_type
from lora_cli.ops.products import onednn_multiplies
from lora_cli.ops.rows import Rows, own_keys
from lora_cli.ops.sight import Sight
from lora_cli.ops.tiles import Tile, Tiling, tiling_of


def attend_in_blocks(
    query_NHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, rows: Rows, sight: Sight, dropout: float = 0.0
) -> Tensor:
    """(N, H, D). Keys and values are those of ``rows.key_lengths``: each row's own, behind the shared prefix."""
    dropped = Dropped(dropout, int(torch.empty((), dtype=torch.int64).random_())) if dropout else None
    return _BlockedAttention.apply(query_NHD, key_MKD, value_MKD, rows, sight, dropped)


@dataclass(frozen=True)
class Dropped:
    """Which probabilities count nothing: drawn for each tile from a seed, so that they can be drawn again."""

    share: float
    seed: int

    def mask(self, number: int, scores_SQT: Tensor) -> Tensor:
        """(S, Q, T) for the tile of this number."""
        device = "cpu" if scores_SQT.is_meta else scores_SQT.device
        generator = torch.Generator(device).manual_seed((self.seed + number) % 2**63)
        return draw_mask(scores_SQT.shape, self.share, scores_SQT.device, generator)

    def counted(self, x_SQT: Tensor, mask_SQT: Tensor) -> Tensor:
        return masked(x_SQT, mask_SQT).mul_(scale_of(self.share))


class _BlockedAttention(torch.autograd.Function):
    """Saves queries, keys and values as they came, and of short rows the probabilities; tiles are filled anew."""

    @staticmethod
    def forward(
        ctx: Any,
        query_NHD: Tensor,
        key_MKD: Tensor,
        value_MKD: Tensor,
        rows: Rows,
        sight: Sight,
        dropped: Dropped | None,
    ) -> Tensor:
        tiling = tiling_of(rows, query_NHD, key_MKD, sight)
        q_LD, k_FD, v_FD = _in_tiles(tiling, query_NHD, key_MKD, value_MKD, sight)
        out_LD = v_FD.new_empty(len(q_LD), v_FD.shape[1])
        trains, kept = any(ctx.needs_input_grad), []
        in_turn = rows.in_turn(tiling.tiles)
        for number, tile in enumerate(in_turn):
            p_SQT, _ = _probabilities(tile, tile.of_queries(q_LD), _keys(tile, k_FD), sight)
            counted_SQT = p_SQT if dropped is None else dropped.counted(p_SQT, dropped.mask(number, p_SQT))
            _product(counted_SQT, _keys(tile, v_FD), out=tile.of_queries(out_LD))
            if trains and _keeps(tile, sight):
                kept.append(p_SQT)
        if trains and len(in_turn) < len(tiling.tiles):  # a rehearsal: the others leave no less behind
            others = [tile for tile in tiling.tiles if tile is not in_turn[0] and _keeps(tile, sight)]
            kept += [v_FD.new_empty(tile.num_scores) for tile in others]
        ctx.rows, ctx.sight = replace(rows, source=own_keys), sight  # a source may hold keys and values
        ctx.dropped, ctx.tiling = dropped, tiling
        ctx.save_for_backward(query_NHD, key_MKD, value_MKD, *kept)
        return tiling.queries.empty(out_LD, query_NHD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHD: Tensor) -> tuple[Any, ...]:
        query_NHD, key_MKD, value_MKD, *probabilities = ctx.saved_tensors
        tiling: Tiling = ctx.tiling
        q_LD, k_FD, v_FD = _in_tiles(tiling, query_NHD, key_MKD, value_MKD, ctx.sight)
        do_LD = tiling.queries.fill_with_zeros(gradient_NHD, query_NHD.shape[1] // key_MKD.shape[1])
        dq_LD = torch.empty_like(q_LD)
        dk_FD, dv_FD = (torch.zeros_like(t, dtype=wide_type(t.dtype)) for t in (k_FD, v_FD))
        kept = iter(probabilities)
        for number, tile in enumerate(ctx.rows.in_turn(tiling.tiles)):
            p_SQT = next(kept) if _keeps(tile, ctx.sight) else None
            drop = None if ctx.dropped is None else (ctx.dropped, number)
            _tile_backward(tile, (q_LD, k_FD, v_FD), do_LD, (dq_LD, dk_FD, dv_FD), ctx.sight, p_SQT, drop)
        dk_FD.mul_(ctx.sight.scaling)
        dk_MKD, dv_MKD = (tiling.keys.empty(t.to(key_MKD.dtype), key_MKD.shape[1]) for t in (dk_FD, dv_FD))
        return tiling.queries.empty(dq_LD, query_NHD.shape[1]), dk_MKD, dv_MKD, None, None, None


def _in_tiles(
    tiling: Tiling, query_NHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, sight: Sight
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, scaled where the scaling costs least: there are fewer keys than queries."""
    shared = query_NHD.shape[1] // key_MKD.shape[1]
    keys = tiling.keys
    return tiling.queries.fill(query_NHD, shared), keys.fill(key_MKD * sight.scaling, 1), keys.fill(value_MKD, 1)


def _tile_backward(
    tile: Tile,
    inputs: tuple[Tensor, Tensor, Tensor],
    do_LD: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    sight: Sight,
    p_SQT: Tensor | None,
    drop: tuple[Dropped, int] | None,
) -> None:
    """With P = softmax(S): dV = (F P)^T dO, dP = F (dO V^T), dS = P (dP - rowsum(P dP)). Writes dQ, adds to dK and dV.

    F are the factors of dropout. Queries that are padding have dO = 0, and so add nothing anywhere.
    """
    q_LD, k_FD, v_FD = inputs
    dq_LD, dk_FD, dv_FD = gradients
    q, do, k = tile.of_queries(q_LD), tile.of_queries(do_LD), _keys(tile, k_FD)
    tanh_SQT = None
    if p_SQT is None:
        p_SQT, tanh_SQT = _probabilities(tile, q, k, sight)
    dp_SQT, counted_SQT = _product(do, _keys(tile, v_FD).transpose(1, 2)), p_SQT
    if drop is not None:
        dropped, number = drop
        mask_SQT = dropped.mask(number, p_SQT)
        dp_SQT, counted_SQT = dropped.counted(dp_SQT, mask_SQT), dropped.counted(p_SQT, mask_SQT)
    tile.of_keys(dv_FD).add_(_product(counted_SQT.transpose(1, 2), do))
    ds_SQT = torch._softmax_backward_data(dp_SQT, p_SQT, -1, p_SQT.dtype)
    if tanh_SQT is not None:
        ds_SQT.mul_(1 - tanh_SQT.square())
    _product(ds_SQT, k, out=tile.of_queries(dq_LD))
    tile.of_keys(dk_FD).add_(_product(ds_SQT.transpose(1, 2), q))


def _probabilities(tile: Tile, q_SQD: Tensor, k_STD: Tensor, sight: Sight) -> tuple[Tensor, Tensor | None]:
    """(S, Q, T) in the inputs' type; and the tanh of the capped scores where there is a cap."""
    narrow = q_SQD.dtype.itemsize == 2
    scores_SQT = (wide_product if narrow else _product)(q_SQD, k_STD.transpose(1, 2))
    tanh_SQT = None
    if sight.softcap is not None:
        tanh_SQT = scores_SQT.div_(sight.softcap).tanh_()
        scores_SQT = tanh_SQT * sight.softcap
    tile.hide(scores_SQT)
    return torch.softmax(scores_SQT, -1).to(q_SQD.dtype), tanh_SQT


def _keeps(tile: Tile, sight: Sight) -> bool:
    """A cap on scores has a derivative of its own, which needs more than the probabilities."""
    return tile.short and sight.softcap is None


def _keys(tile: Tile, x_FD: Tensor) -> Tensor:
    """(S, T, D). For products of two-byte types the library copies batches with gaps, and transposed ones slowly."""
    x_STD = tile.of_keys(x_FD)
    return x_STD.contiguous() if x_STD.dtype.itemsize == 2 else x_STD


def _product(a_SMK: Tensor, b_SKN: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, in ``out`` where it is given.

    MKL deals products out to threads whole: of an odd number the last one is cut up instead.
    """
    if out is None:
        out = a_SMK.new_empty(len(a_SMK), a_SMK.shape[1], b_SKN.shape[2])
    whole = a_SMK.dtype.itemsize > 2 and not (a_SMK.dtype == torch.float32 and onednn_multiplies())
    if not (whole and len(a_SMK) % 2 and torch.get_num_threads() % 2 == 0):
        return torch.bmm(a_SMK, b_SKN, out=out)
    if len(a_SMK) > 1:
        torch.bmm(a_SMK[:-1], b_SKN[:-1], out=out[:-1])
    torch.mm(a_SMK[-1], b_SKN[-1], out=out[-1])
    return out
