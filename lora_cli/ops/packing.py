"""Weights packed into 4 or 8 bits and made again from them, in the formats of bitsandbytes.

nf4 (arXiv:2305.14314, section 3): blocks of 64 weights share a scale, and each weight is one of 16 quantiles of the
normal distribution; the scales are packed into 8 bits themselves (double quantization). 0.516 bytes a weight.
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
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.errors import UsageError

SIZE = 64  # weights that share a scale
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


@cache
def library() -> Any:
    """``bitsandbytes.functional``. Raises ``UsageError`` where it is not installed."""
    with _quietly():
        try:
            return importlib.import_module("bitsandbytes.functional")
        except ImportError:
            message = "model.quantization: bitsandbytes is not installed"
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


def _pack_nf4(weight_OI: Tensor) -> Parts:
    """``quantize_4bit`` with ``compress_statistics``, in parts: it makes float32 copies of what it gets."""
    parts = [
        library().quantize_4bit(blocks_KS, blocksize=SIZE, quant_type="nf4")
        for blocks_KS in _blocks(weight_OI).split(AT_A_TIME // SIZE)
    ]
    scale_K = torch.cat([state.absmax for _, state in parts])
    offset = scale_K.mean()
    scales_K, state = library().quantize_blockwise(scale_K - offset, blocksize=SCALES)
    return torch.cat([packed for packed, _ in parts]), scales_K, state.absmax, offset


def _blocks(weight_OI: Tensor) -> Tensor:
    """(K, S), the last block filled up with zeros.

    bitsandbytes' blocks run through all of a weight too; but its CPU kernel of version 0.50 unpacks row by row, which
    gives other numbers where a row is no whole number of blocks. As rows of one block each, they come back as they are.
    """
    flat = weight_OI.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % SIZE)).view(-1, SIZE)


def _unpack_nf4(parts: Parts, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    packed, scales_K, coarse, offset = parts
    blocks_KS = _unpacked_blocks(packed, _fine_scales(scales_K, coarse, offset), dtype)
    return blocks_KS.view(-1)[: shape[0] * shape[1]].view(shape)


def _fine_scales(scales_K: Tensor, coarse: Tensor, offset: Tensor) -> Tensor:
    """(K,) float32"""
    if scales_K.is_meta:
        return torch.empty_like(scales_K, dtype=torch.float32)
    code = _scale_code(scales_K.device)
    return library().dequantize_blockwise(scales_K, absmax=coarse, code=code, blocksize=SCALES).add_(offset)


def _unpacked_blocks(packed: Tensor, scale_K: Tensor, dtype: torch.dtype) -> Tensor:
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


def _sizes_nf4(weight_OI: Tensor) -> Parts:
    blocks = -(-weight_OI.numel() // SIZE)
    return (
        _on_paper(blocks * SIZE // 2, 1, dtype=torch.uint8),
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


FORMATS = {
    "nf4": Format(_pack_nf4, _unpack_nf4, _sizes_nf4),
    "int8": Format(_pack_int8, _unpack_int8, _sizes_int8),
}
