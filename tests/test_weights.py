"""Weight files with packed weights in them: the bits that were written, read by this tool and by bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as theirs
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_cli.errors import StorageError
from lora_cli.ops.packing import Packed
from lora_cli.seeds import stream
from lora_cli.tensorfile import Entry, write_tensors
from lora_cli.weights import (
    PACKED,
    Form,
    WeightFile,
    dense_weights,
    is_packed,
    packed_metadata,
    packed_weights,
    weight_entries,
)

KINDS = ["nf2", "nf3", "nf4", "int8"]
NAME, OTHER = "layer.weight", "norm.weight"


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(32, 128, generator=stream(0, "weights")).to(dtype)


def written(folder: Path, kind: str, dtype: torch.dtype = torch.float32, *, transposed: bool = False) -> Packed:
    """A file with a packed weight and a plain one."""
    packed = Packed.of(weight(dtype), kind)
    form = Form(kind, 32, 128, dtype, transposed)
    tensors = form.tensors(NAME, packed) | {OTHER: torch.ones(5)}
    entries = [*form.entries(NAME), Entry(OTHER, "F32", (5,))]
    metadata = packed_metadata({NAME: form})
    write_tensors(folder / "model.safetensors", entries, lambda entry: tensors[entry.name], metadata)
    return packed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_comes_back_to_the_bit(kind, dtype, transposed, tmp_path):
    packed = written(tmp_path, kind, dtype, transposed=transposed)
    file = WeightFile(tmp_path / "model.safetensors")
    found = file.packed(NAME)
    assert all(torch.equal(one, other) for one, other in zip(found.parts, packed.parts, strict=True))
    assert (found.kind, found.shape, found.dtype) == (kind, (32, 128), dtype)
    expected = packed.weight().T if transposed else packed.weight()
    assert torch.equal(file.tensor(NAME), expected)
    assert torch.equal(dense_weights(tmp_path)[NAME], expected)
    assert torch.equal(dense_weights(tmp_path)[OTHER], torch.ones(5))
    shapes = {entry.name: (entry.shape, entry.dtype) for entry in weight_entries(tmp_path)}
    assert shapes == {
        NAME: ((128, 32) if transposed else (32, 128), "F32" if dtype == torch.float32 else "BF16"),
        OTHER: ((5,), "F32"),
    }
    assert is_packed(tmp_path)
    assert list(packed_weights(tmp_path, lambda name: f"model.{name}")) == [f"model.{NAME}"]
    assert list(packed_weights(tmp_path, lambda name: None)) == []


def test_bitsandbytes_reads_four_bits_to_the_bit(tmp_path):
    packed = written(tmp_path, "nf4")
    tensors = load_file(tmp_path / "model.safetensors")
    parts = {name.removeprefix("layer."): t for name, t in tensors.items() if name.startswith(f"{NAME}.")}
    state = theirs.QuantState.from_dict(parts, device=torch.device("cpu"))
    assert torch.equal(theirs.dequantize_4bit(tensors[NAME], state), packed.weight())


def test_bitsandbytes_reads_eight_bits_to_the_bit(tmp_path):
    packed = written(tmp_path, "int8")
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(theirs.int8_vectorwise_dequant(tensors[NAME], tensors["layer.SCB"]), packed.weight())


def test_a_plain_file_has_none(tmp_path):
    write_tensors(tmp_path / "model.safetensors", [Entry(OTHER, "F32", (5,))], lambda entry: torch.ones(5))
    assert not is_packed(tmp_path)
    assert [entry.name for entry in weight_entries(tmp_path)] == [OTHER]


@pytest.mark.parametrize("text", ["{", '{"layer.weight": ["nf4"]}', '{"layer.weight": ["nf4", 1, 2, "float7", false]}'])
def test_a_description_that_cannot_be_read_is_damage(text, tmp_path):
    write_tensors(
        tmp_path / "model.safetensors", [Entry(OTHER, "F32", (5,))], lambda entry: torch.ones(5), {PACKED: text}
    )
    with pytest.raises(StorageError, match="packed weights is not understood"):
        is_packed(tmp_path)


def test_a_part_that_is_missing_is_damage(tmp_path):
    form = Form("nf4", 32, 128, torch.float32, transposed=False)
    metadata = packed_metadata({NAME: form})
    write_tensors(tmp_path / "model.safetensors", [Entry(OTHER, "F32", (5,))], lambda entry: torch.ones(5), metadata)
    with pytest.raises(StorageError, match=r"lacks layer.weight, layer.weight.absmax"):
        WeightFile(tmp_path / "model.safetensors")


def test_the_description_has_one_length_whatever_it_says(tmp_path):
    written(tmp_path, "nf4")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        state = file.get_tensor(f"{NAME}.quant_state.bitsandbytes__nf4")
    assert len(state) == 512
    assert json.loads(bytes(state.tolist()))["shape"] == [32, 128]
