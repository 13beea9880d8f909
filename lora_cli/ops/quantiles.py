"""Weights as quantiles of the normal distribution, in fewer bits than bitsandbytes has: NF2 and NF3.

The table is NF4's with fewer entries (arXiv:2305.14314, eq. 4; arXiv:2310.08659, section 3.1 for 2 bits): quantiles of
N(0, 1), evenly spread over each half, with a zero of their own and the outermost at -1 and 1.

Shape suffixes: K blocks, S size of a block, B bits of a code, P bytes that hold one bit of each weight of a block.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

SIZE = 64  # weights that share a scale
OUTERMOST = 0.9677083  # bitsandbytes' (1 - 1/30 + 1 - 1/32) / 2: the largest quantile, which becomes 1
WEIGHTS_OF_BITS = tuple(1 << bit for bit in range(8))


@cache
def quantiles(bits: int, device: torch.device) -> Tensor:
    """(2^bits,) float32 from -1 to 1; one more above zero than below."""
    half = 2 ** (bits - 1)
    above = torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, half + 1, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(OUTERMOST, 0.5, half, dtype=torch.float64))[:-1]
    table = torch.cat([above / above[0], torch.zeros(1, dtype=torch.float64), below / above[0]])
    return table.sort().values.float().to(device)


def pack_codes(blocks_KS: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes of the nearest quantiles, (K * B * P, 1) uint8, and the blocks' scales, (K,) float32.

    Bit by bit: the lowest bit of all weights of a block lies in its first 8 bytes, the next in the next 8.
    """
    values_KS = blocks_KS.float()
    scale_K = values_KS.abs().amax(1)
    table = quantiles(bits, blocks_KS.device)
    between = (table[1:] + table[:-1]) / 2
    codes_KS = torch.bucketize(values_KS / scale_K.clamp(min=1e-30)[:, None], between)
    positions = torch.tensor(WEIGHTS_OF_BITS, device=blocks_KS.device)
    bits_KBS = (codes_KS[:, None] >> torch.arange(bits, device=blocks_KS.device)[:, None]) & 1
    bytes_KBP = (bits_KBS.view(len(blocks_KS), bits, SIZE // 8, 8) * positions).sum(-1)
    return bytes_KBP.to(torch.uint8).view(-1, 1), scale_K


def unpack_codes(planes_KBP: Tensor, scale_K: Tensor) -> Tensor:
    """The weights again, (K, S) float32."""
    blocks, bits = planes_KBP.shape[:2]
    shifts = torch.arange(8, dtype=torch.uint8, device=planes_KBP.device)
    bits_KBS = ((planes_KBP[..., None] >> shifts) & 1).view(blocks, bits, SIZE)
    codes_KS = bits_KBS[:, 0].int()
    for bit in range(1, bits):
        codes_KS += bits_KBS[:, bit].int() << bit
    return quantiles(bits, planes_KBP.device)[codes_KS] * scale_K[:, None]
