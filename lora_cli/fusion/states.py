"""Where the hidden states of rows are kept: in memory, or in a file that vanishes with the run.

Shape suffixes: T tokens, D hidden size.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lora_cli.data.encoding import Example
from lora_cli.storage import storage_errors


def key_of(example: Example) -> bytes:
    """A row's states depend on its tokens and on nothing else."""
    return hashlib.blake2b(example.input_ids.tobytes(), digest_size=16).digest()


class States(Protocol):
    """The states of rows, on the host."""

    def __contains__(self, key: bytes) -> bool: ...

    def put(self, key: bytes, states_TD: Tensor) -> None: ...

    def get(self, key: bytes) -> Tensor: ...


class MemoryStates:
    def __init__(self) -> None:
        self._rows: dict[bytes, Tensor] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def put(self, key: bytes, states_TD: Tensor) -> None:
        self._rows[key] = states_TD.clone()  # not a view: one row must not hold a whole batch

    def get(self, key: bytes) -> Tensor:
        return self._rows[key]


class DiskStates:
    """One file without a name: the system frees it however the run ends.

    It is read and written, not mapped: a full disk is then an error, and no signal that kills.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[bytes, tuple[int, tuple[int, ...], torch.dtype]] = {}
        self._end = 0
        with storage_errors(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed with this object
        weakref.finalize(self, self._file.close)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def put(self, key: bytes, states_TD: Tensor) -> None:
        with storage_errors(self._folder):
            self._file.seek(self._end)
            self._file.write(_bytes_of(states_TD.contiguous()))
            self._file.flush()
        self._places[key] = (self._end, tuple(states_TD.shape), states_TD.dtype)
        self._end += states_TD.nbytes

    def get(self, key: bytes) -> Tensor:
        start, shape, dtype = self._places[key]
        states_TD = torch.empty(shape, dtype=dtype)
        with storage_errors(self._folder):
            self._file.seek(start)
            self._file.readinto(_bytes_of(states_TD))
        return states_TD


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
