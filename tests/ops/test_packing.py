"""Packed weights: bitsandbytes' own numbers where those are right, the formats' definitions, and their sizes."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from lora_cli.errors import UsageError
from lora_cli.ops import packing
from lora_cli.ops.packing import library, pack, unpack
from lora_cli.ops.quantiles import SIZE, quantiles
from lora_cli.seeds import stream

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The last ones are no whole numbers of blocks, by rows or in all.
SHAPES = [(128, 256), (512, 64), (96, 80), (33, 65), (7, 9)]
# Mean error of a normal weight, in its standard deviations: 4, 8 or 16 quantiles, and 127ths of a row's largest.
ERRORS = {"nf2": 0.5, "nf3": 0.19, "nf4": 0.09, "int8": 0.009}


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=stream(seed, "packing")).to(dtype)


def nf4_by_definition(weight_OI: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Block by block: one of 16 values, times the block's scale; the scale one of 256 values, times its block's."""
    packed, scales, coarse, offset = parts
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1).long()
    fine = library().create_dynamic_map()[scales.long()] * coarse.repeat_interleave(256)[: len(scales)] + offset
    values = library().get_4bit_type("nf4", device="cpu")[codes] * fine.repeat_interleave(SIZE)
    return values[: weight_OI.numel()].view(weight_OI.shape).to(weight_OI.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_unpacks_as_defined_on_any_width(shape, dtype):
    original = weight(shape, dtype)
    parts = pack(original, "nf4")
    assert torch.equal(unpack(parts, "nf4", shape, dtype), nf4_by_definition(original, parts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_is_bitsandbytes_with_double_quantization(dtype, monkeypatch):
    """Packed in one part or in many: the very bytes, and the very weights."""
    original = weight((256, 128), dtype)
    theirs, state = library().quantize_4bit(original, blocksize=64, compress_statistics=True, quant_type="nf4")
    for at_a_time in (2**22, 2**12):
        monkeypatch.setattr(packing, "AT_A_TIME", at_a_time)
        parts = pack(original, "nf4")
        for ours, their in zip(parts, (theirs, state.absmax, state.state2.absmax, state.offset), strict=True):
            assert torch.equal(ours, their)
        assert torch.equal(unpack(parts, "nf4", (256, 128), dtype), library().dequantize_4bit(theirs, state))


def test_the_quantiles_of_four_bits_are_bitsandbytes_own():
    """So the formula is the right one for two bits and three: there is no other reader of those."""
    theirs = library().get_4bit_type("nf4", device="cpu")
    torch.testing.assert_close(quantiles(4, torch.device("cpu")), theirs, rtol=0, atol=1e-6)
    assert quantiles(2, torch.device("cpu")).tolist() == pytest.approx([-1.0, 0.0, 0.33792, 1.0], abs=1e-4)


@pytest.mark.parametrize("in_cache", [2**18, 128])
@pytest.mark.parametrize("kind", ["nf2", "nf3"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_bits_take_the_nearest_quantile(kind, shape, in_cache, monkeypatch):
    """Weight by weight against all of the table, in float64; the scale is the block's, itself packed as nf4's is."""
    monkeypatch.setattr(packing, "IN_CACHE", in_cache)
    original = weight(shape)
    parts = pack(original, kind)
    blocks = torch.nn.functional.pad(original.view(-1), (0, -original.numel() % SIZE)).view(-1, SIZE).double()
    table = quantiles(int(kind[-1]), torch.device("cpu")).double()
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = table[((blocks / scale)[..., None] - table).abs().argmin(-1)]
    fine = library().create_dynamic_map()[parts[1].long()] * parts[2].repeat_interleave(256)[: len(parts[1])] + parts[3]
    expected = (nearest * fine[:, None].double()).view(-1)[: original.numel()].view(shape)
    torch.testing.assert_close(unpack(parts, kind, shape, torch.float32).double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_bitsandbytes(shape, dtype, monkeypatch):
    original = weight(shape, dtype)
    packed, scale, _ = library().int8_vectorwise_quant(original)
    expected = library().int8_vectorwise_dequant(packed, scale).to(dtype)
    for in_cache in (2**18, 100):
        monkeypatch.setattr(packing, "IN_CACHE", in_cache)
        assert torch.equal(unpack(pack(original, "int8"), "int8", shape, dtype), expected)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_packing_loses_is_what_so_few_bits_lose(kind, shape):
    original = weight(shape)
    lost = (unpack(pack(original, kind), kind, shape, torch.float32) - original).abs().mean()
    assert 0.1 * ERRORS[kind] < lost < ERRORS[kind]


@pytest.mark.parametrize("kind", ERRORS)
def test_a_row_of_zeros_stays_one(kind):
    original = weight((8, 64))
    original[3] = 0
    found = unpack(pack(original, kind), kind, (8, 64), torch.float32)
    assert torch.isfinite(found).all()
    assert found[3].abs().max() < 1e-7
    assert found[2].abs().max() > 1


@pytest.mark.parametrize(
    ("kind", "most", "least"), [("nf2", 0.135, 0.125), ("nf3", 0.2, 0.1875), ("nf4", 0.26, 0.25), ("int8", 0.51, 0.5)]
)
def test_bytes_against_bfloat16(kind, most, least):
    original = weight((256, 512), torch.bfloat16)
    ratio = sum(part.nbytes for part in pack(original, kind)) / original.nbytes
    assert least < ratio < most


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_meta_the_sizes_are_the_same(kind, shape):
    real, outlined = pack(weight(shape), kind), pack(weight(shape).to("meta"), kind)
    assert [(part.shape, part.dtype) for part in outlined] == [(part.shape, part.dtype) for part in real]
    found = unpack(outlined, kind, shape, torch.bfloat16)
    assert (found.shape, found.dtype, found.is_meta) == (shape, torch.bfloat16, True)


def test_without_bitsandbytes_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    library.cache_clear()
    try:
        with pytest.raises(UsageError) as caught:
            library()
    finally:
        library.cache_clear()
    assert caught.value.message == "a quantized base needs bitsandbytes, which is not installed"
    assert caught.value.help == "pip install 'lora-cli[quant]'"


def test_importing_bitsandbytes_says_nothing_and_leaves_the_log_as_it_was():
    """In a process of its own: here it may be imported already."""
    code = "import sys; from lora_cli.ops.packing import library; library(); print('kernels' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert logging.getLogger("bitsandbytes").level == logging.NOTSET
