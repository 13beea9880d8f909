"""safetensors files tensor by tensor: what is in one, and writing one without holding it in memory.

Format: 8 bytes little-endian header length, the header as JSON (name -> dtype, shape, data_offsets), then the
tensors' bytes without gaps. The safetensors library reads lazily, but can only write a file as a whole.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_cli.errors import StorageError
from lora_cli.storage import storage_errors

METADATA = "__metadata__"  # the one name in a header that is no tensor
MAX_HEADER = 100_000_000  # the format's own bound
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``start`` and ``end`` are its bytes in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def tensor_table(path: Path) -> list[Entry]:
    """Every tensor of a file, in the order of the bytes. Raises ``StorageError`` for a damaged file."""
    with _damage(path):
        header, start = _header(path)
        entries = [_entry(name, value, start) for name, value in header.items() if name != METADATA]
    if entries and max(entry.end for entry in entries) > path.stat().st_size:
        raise StorageError(f"{path} is cut short", "download it again")
    return sorted(entries, key=lambda entry: entry.start)


def metadata_of(path: Path) -> dict[str, str]:
    """What a file says of itself. Raises ``StorageError`` for a damaged file."""
    with _damage(path):
        return dict(_header(path)[0].get(METADATA) or {})


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors' bytes begin."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(min(length, MAX_HEADER))), 8 + length


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise StorageError(f"{path} is not a readable safetensors file", "download it again") from error


def _entry(name: str, value: dict[str, Any], offset: int) -> Entry:
    start, end = value["data_offsets"]
    entry = Entry(name, value["dtype"], tuple(value["shape"]), offset + start, offset + end)
    if entry.dtype in DTYPES and entry.num_bytes != end - start:
        raise ValueError(f"{name} has {end - start} bytes for {entry.num_bytes}")
    return entry


def write_tensors(
    path: Path,
    entries: Iterable[Entry],
    produce: Callable[[Entry], Tensor],
    metadata: dict[str, str] | None = None,
) -> int:
    """Write a file whose tensors ``produce`` makes one after the other. Returns the bytes of all tensors."""
    entries = list(entries)
    header: dict[str, object] = {METADATA: {"format": "pt"} | (metadata or {})}
    position = 0
    for entry in entries:
        end = position + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8
    with storage_errors(path), open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            file.write(_raw(produce(entry), entry))
    return position


def _raw(tensor: Tensor, entry: Entry) -> memoryview:
    assert tuple(tensor.shape) == entry.shape and tensor.dtype == DTYPES[entry.dtype], entry.name
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
