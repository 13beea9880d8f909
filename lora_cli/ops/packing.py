"""Weights packed into 2, 3, 4 or 8 bits and made again from them, in the formats of bitsandbytes where it has one.

nf4 (arXiv:2305.14314, section 3): blocks of 64 weights share a scale, and each weight is one of 16 quantiles of the
normal distribution; the scales are packed into 8 bits themselves (double quantization). 0.516 bytes a weight.
nf2 and nf3: the same with 4 and 8 quantiles (``quantiles.py``). 0.266 and 0.391 bytes a weight.
int8 (arXiv:2208.07339, section 2.1): a row shares a scale, and each weight is a whole number of 127ths of it.

Only packing and unpacking are bitsandbytes': products run on the unpacked weight.

Shape suffixes: O out_features, I in_features, K blocks, S size of a block.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.errors import UsageError
from lora_cli.ops.quantiles import SIZE, pack_codes, unpack_codes

SCALES = 256  # scales that share one in turn
AT_A_TIME, IN_CACHE = 2**22, 2**18  # weights that are packed at a time, and unpacked on the CPU
Parts = tuple[Tensor, ...]  # the packed weight, and what else it takes to unpack it


def pack(weight_OI: Tensor, kind: str) -> Parts:
    """The weight as ``kind`` stores it; of a weight on meta, tensors of those sizes.

    Raises ``UsageError`` where bitsandbytes is not installed.
    """
    form = FORMATS[kind]
    return form.sizes(weight_OI) if weight_OI.is_meta else form.pack(weight_OI)


def unpack(parts: Parts, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The inverse, up to what packing has lost. (O, I)"""
    return FORMATS[kind].unpack(parts, shape, dtype)


@dataclass(frozen=True)
class Packed:
    """A weight as it is stored, with all that it takes to make it again."""

    parts: Parts
    kind: str
    shape: tuple[int, int]  # (O, I)
    dtype: torch.dtype  # of the weight that it stands for

    @classmethod
    def of(cls, weight_OI: Tensor, kind: str) -> Packed:
        out_features, in_features = weight_OI.shape
        return cls(pack(weight_OI.contiguous(), kind), kind, (out_features, in_features), weight_OI.dtype)

    def to(self, device: torch.device) -> Packed:
        return replace(self, parts=tuple(part.to(device) for part in self.parts))

    def weight(self) -> Tensor:
        """(O, I)"""
        return unpack(self.parts, self.kind, self.shape, self.dtype)


@cache
def library() -> Any:
    """``bitsandbytes.functional``. Raises ``UsageError`` where it is not installed."""
    with _quietly():
        try:
            return importlib.import_module("bitsandbytes.functional")
        except ImportError:
            message = "a quantized base needs bitsandbytes, which is not installed"
            raise UsageError(message, "pip install 'lora-cli[quant]'") from None


@contextmanager
def _quietly() -> Iterator[None]:
    """On import bitsandbytes would fetch kernels from the hub, and say so where it cannot; none is used here."""
    logger = logging.getLogger("bitsandbytes")
    level, known = logger.level, "kernels" in sys.modules
    logger.setLevel(logging.ERROR)
    if not known:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if not known:
            del sys.modules["kernels"]


def _pack_blocks(weight_OI: Tensor, pack_part: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Parts:
    """Codes and scales of all blocks, some at a time: packing makes float32 copies of what it gets."""
    parts = [pack_part(blocks_KS) for blocks_KS in _blocks(weight_OI).split(AT_A_TIME // SIZE)]
    scale_K = torch.cat([scales for _, scales in parts])
    offset = scale_K.mean()
    scales_K, state = library().quantize_blockwise(scale_K - offset, blocksize=SCALES)
    return torch.cat([packed for packed, _ in parts]), scales_K, state.absmax, offset


def _nf4_part(blocks_KS: Tensor) -> tuple[Tensor, Tensor]:
    packed, state = library().quantize_4bit(blocks_KS, blocksize=SIZE, quant_type="nf4")
    return packed, state.absmax


def _blocks(weight_OI: Tensor) -> Tensor:
    """(K, S), the last block filled up with zeros.

    bitsandbytes' blocks run through all of a weight too; but its CPU kernel of version 0.50 unpacks row by row, which
    gives other numbers where a row is no whole number of blocks. As rows of one block each, they come back as they are.
    """
    flat = weight_OI.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % SIZE)).view(-1, SIZE)


def _unpack_blocks(
    parts: Parts,
    shape: tuple[int, int],
    dtype: torch.dtype,
    unpack_part: Callable[[Tensor, Tensor, torch.dtype], Tensor],
) -> Tensor:
    packed, scales_K, coarse, offset = parts
    blocks_KS = unpack_part(packed, _fine_scales(scales_K, coarse, offset), dtype)
    return blocks_KS.view(-1)[: shape[0] * shape[1]].view(shape)


def _fine_scales(scales_K: Tensor, coarse: Tensor, offset: Tensor) -> Tensor:
    """(K,) float32"""
    if scales_K.is_meta:
        return torch.empty_like(scales_K, dtype=torch.float32)
    code = _scale_code(scales_K.device)
    return library().dequantize_blockwise(scales_K, absmax=coarse, code=code, blocksize=SCALES).add_(offset)


def _unpack_nf4_part(packed: Tensor, scale_K: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, S)"""
    shape = (len(scale_K), SIZE)
    if packed.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    state = library().QuantState(absmax=scale_K, shape=shape, dtype=dtype, blocksize=SIZE, quant_type="nf4")
    return library().dequantize_4bit(packed, state)


@cache
def _scale_code(device: torch.device) -> Tensor:
    """The 256 values that a packed scale can have: one table for all layers."""
    return library().create_dynamic_map().to(device)


def _unpack_few_bits(bits: int, packed: Tensor, scale_K: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, S), some blocks at a time: what is made on the way then stays in the processor's cache."""
    blocks_KS = torch.empty(len(scale_K), SIZE, dtype=dtype, device=packed.device)
    if packed.is_meta:
        return blocks_KS
    count = IN_CACHE // SIZE if packed.device.type == "cpu" else max(1, len(scale_K))
    planes_KBP = packed.view(len(scale_K), bits, SIZE // 8)
    for out, planes, scale in zip(blocks_KS.split(count), planes_KBP.split(count), scale_K.split(count), strict=True):
        out.copy_(unpack_codes(planes, scale))
    return blocks_KS


def _sizes_of_blocks(bits: int, weight_OI: Tensor) -> Parts:
    blocks = -(-weight_OI.numel() // SIZE)
    return (
        _on_paper(blocks * SIZE * bits // 8, 1, dtype=torch.uint8),
        _on_paper(blocks, dtype=torch.uint8),
        _on_paper(-(-blocks // SCALES)),
        _on_paper(),
    )


def _pack_int8(weight_OI: Tensor) -> Parts:
    packed_OI, scale_O, _ = library().int8_vectorwise_quant(weight_OI)
    return packed_OI, scale_O


def _unpack_int8(parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """``int8_vectorwise_dequant``, some rows at a time: its float32 copies then stay in the processor's cache."""
    packed_OI, scale_O = parts
    weight_OI = torch.empty(shape, dtype=dtype, device=packed_OI.device)
    rows = _rows_at_a_time(packed_OI)
    for out, packed, scale in zip(weight_OI.split(rows), packed_OI.split(rows), scale_O.split(rows), strict=True):
        out.copy_(packed.float().mul_(scale[:, None]).mul_(1 / 127))
    return weight_OI


def _rows_at_a_time(packed_OI: Tensor) -> int:
    """A GPU has no use for parts."""
    return max(1, IN_CACHE // packed_OI.shape[1]) if packed_OI.device.type == "cpu" else len(packed_OI)


def _sizes_int8(weight_OI: Tensor) -> Parts:
    return _on_paper(*weight_OI.shape, dtype=torch.int8), _on_paper(len(weight_OI))


def _on_paper(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Format:
    """One way to store a weight."""

    pack: Callable[[Tensor], Parts]
    unpack: Callable[[Parts, tuple[int, int], torch.dtype], Tensor]
    sizes: Callable[[Tensor], Parts]


def _few_bits(bits: int) -> Format:
    return Format(
        partial(_pack_blocks, pack_part=partial(pack_codes, bits=bits)),
        partial(_unpack_blocks, unpack_part=partial(_unpack_few_bits, bits)),
        partial(_sizes_of_blocks, bits),
    )


FORMATS = {
    "nf2": _few_bits(2),
    "nf3": _few_bits(3),
    "nf4": Format(
        partial(_pack_blocks, pack_part=_nf4_part),
        partial(_unpack_blocks, unpack_part=_unpack_nf4_part),
        partial(_sizes_of_blocks, 4),
    ),
    "int8": Format(_pack_int8, _unpack_int8, _sizes_int8),
}
