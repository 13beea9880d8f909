"""Our reading and writing of safetensors against the library's."""

from __future__ import annotations

import errno
import json
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_cli.errors import StorageError
from lora_cli.tensorfile import DTYPES, NAMES, Entry, tensor_table, write_tensors

SHAPES = [(), (0,), (3,), (2, 3), (2, 0, 4), (5, 1, 2, 2)]


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    torch.manual_seed(len(shape))
    return (torch.randn(shape) * 3).to(dtype)


def tensors() -> dict[str, torch.Tensor]:
    return {
        f"{name}.{index}": sample(dtype, shape) for name, dtype in DTYPES.items() for index, shape in enumerate(SHAPES)
    }


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def entries_of(values: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, NAMES[t.dtype], tuple(t.shape)) for name, t in values.items()]


def test_what_we_write_the_library_reads_bit_for_bit(tmp_path):
    values = tensors()
    total = write_tensors(tmp_path / "a", entries_of(values), lambda entry: values[entry.name])
    read = load_file(tmp_path / "a")
    assert {name: bits(t) for name, t in read.items()} == {name: bits(t) for name, t in values.items()}
    assert total == sum(t.numel() * t.element_size() for t in values.values())
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_we_list(tmp_path):
    values = tensors()
    save_file(values, tmp_path / "a", metadata={"format": "pt"})
    raw = (tmp_path / "a").read_bytes()
    table = tensor_table(tmp_path / "a")
    assert {entry.name for entry in table} == set(values)
    for entry in table:
        assert (DTYPES[entry.dtype], entry.shape, raw[entry.start : entry.end]) == bits(values[entry.name])
        assert entry.num_bytes == entry.end - entry.start
    assert [entry.start for entry in table] == sorted(entry.start for entry in table)


def test_the_data_begins_on_a_multiple_of_eight(tmp_path):
    for length in range(1, 9):
        path = tmp_path / str(length)
        write_tensors(path, [Entry("x" * length, "F32", (1,))], lambda _: torch.ones(1))
        (header,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert header % 8 == 0
        assert tensor_table(path)[0].end == path.stat().st_size


def test_a_tensor_that_is_not_contiguous_is_written_in_its_own_order(tmp_path):
    value = torch.arange(6.0).reshape(2, 3).T
    write_tensors(tmp_path / "a", [Entry("x", "F32", (3, 2))], lambda _: value)
    assert torch.equal(load_file(tmp_path / "a")["x"], value)


def test_the_writer_never_holds_two_tensors(tmp_path):
    """Peak memory is one tensor: when the next is made, the one before is gone."""
    alive: list[weakref.ref] = []

    def produce(entry: Entry) -> torch.Tensor:
        assert not [reference for reference in alive if reference() is not None], entry.name
        tensor = torch.ones(entry.shape)
        alive.append(weakref.ref(tensor))
        return tensor

    write_tensors(tmp_path / "a", [Entry(str(i), "F32", (64, 64)) for i in range(5)], produce)
    assert len(alive) == 5


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2, dtype=torch.float64)])
def test_a_tensor_that_is_not_what_the_header_says_is_our_own_mistake(tmp_path, wrong):
    with pytest.raises(AssertionError, match="x"):
        write_tensors(tmp_path / "a", [Entry("x", "F32", (2,))], lambda _: wrong)


def test_a_full_disk_is_a_storage_error(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda *_: Full())
    with pytest.raises(StorageError) as caught:
        write_tensors(tmp_path / "a", [], lambda _: torch.ones(1))
    assert caught.value.exit_code == 5
    assert "No space left on device" in caught.value.message


# damaged files


def header(value: object) -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.fixture
def good(tmp_path) -> Path:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(100.0), "y": torch.arange(8)}, path)
    return path


@pytest.mark.parametrize("keep", [0, 4, 8, 40])
def test_a_file_cut_in_its_header_is_refused(good, keep):
    good.write_bytes(good.read_bytes()[:keep])
    with pytest.raises(StorageError, match="is not a readable safetensors file"):
        tensor_table(good)


def test_a_file_cut_in_its_data_is_refused(good):
    good.write_bytes(good.read_bytes()[:-1])
    with pytest.raises(StorageError, match="is cut short") as caught:
        tensor_table(good)
    assert caught.value.help == "download it again"


@pytest.mark.parametrize(
    "raw",
    [
        b"<html>not found</html>",
        b"\xff" * 64,
        header([]),
        header(None),
        header({"x": 1}),
        header({"x": {"dtype": "F32", "shape": [1]}}),
        header({"x": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}),
        header({"x": {"dtype": "F32", "shape": [1], "data_offsets": ["a", "b"]}}),
        header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}) + b"\0" * 8,
        header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}) + b"\0" * 8,
        header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + b"\0" * 4,
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, raw):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    with pytest.raises(StorageError):
        tensor_table(path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StorageError):
        tensor_table(tmp_path / "nowhere")


def test_types_that_torch_lacks_are_listed_with_their_size(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(header({"x": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}) + b"\0" * 8)
    [entry] = tensor_table(path)
    assert (entry.dtype, entry.shape, entry.end - entry.start) == ("F4", (16,), 8)
