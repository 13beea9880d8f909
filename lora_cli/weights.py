"""The weight files of a base, some of whose weights may lie in them packed.

A packed weight lies in a file as bitsandbytes' own checkpoints have it, so that transformers reads those of 4 and 8
bits: under the weight's name what it is packed as, beside it the scales (`.absmax` and so on; `.SCB` for int8). What a
name stands for is also said in the file's metadata, where this tool looks; see ``PACKED``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_cli.errors import StorageError
from lora_cli.hub import weight_files
from lora_cli.ops.packing import SCALES, Packed, library, pack
from lora_cli.ops.quantiles import SIZE, quantiles
from lora_cli.tensorfile import NAMES, Entry, metadata_of, tensor_table

PACKED = "lora_packed"  # in a file's metadata: JSON, name -> [kind, O, I, dtype, transposed]
STATE_BYTES = 512  # of a block format's description, filled up with blanks: its length is known before its values
BITS = {"nf2": 2, "nf3": 3, "nf4": 4}


@dataclass(frozen=True)
class Form:
    """How a weight is packed, before any of its values is known."""

    kind: str
    out_features: int
    in_features: int
    dtype: torch.dtype
    transposed: bool  # the model wants it as (I, O)

    @property
    def shape(self) -> tuple[int, int]:
        """As the model wants it."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    def entries(self, name: str) -> list[Entry]:
        """The tensors that hold it in a file, the first of them under its own name."""
        empty = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        sizes = dict(zip(_part_names(name, self.kind), pack(empty, self.kind), strict=False))
        sizes |= {other: tensor.to("meta") for other, tensor in self._tables(name).items()}
        if self.kind in BITS:
            sizes[_state_name(name, self.kind)] = torch.empty(STATE_BYTES, dtype=torch.uint8, device="meta")
        return [Entry(key, NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in sizes.items()]

    def tensors(self, name: str, packed: Packed) -> dict[str, Tensor]:
        """What these entries hold."""
        found = dict(zip(_part_names(name, self.kind), packed.parts, strict=False)) | self._tables(name)
        if self.kind in BITS:
            found[_state_name(name, self.kind)] = self._state(float(packed.parts[-1]))
        return {key: tensor.cpu() for key, tensor in found.items()}

    def _tables(self, name: str) -> dict[str, Tensor]:
        """The values that codes stand for, which other readers look up in the file."""
        if self.kind not in BITS:
            return {}
        return {
            f"{name}.quant_map": quantiles(BITS[self.kind], torch.device("cpu")),
            f"{name}.nested_quant_map": library().create_dynamic_map().cpu(),
        }

    def _state(self, offset: float) -> Tensor:
        values = {
            "quant_type": self.kind,
            "blocksize": SIZE,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
            "nested_blocksize": SCALES,
            "nested_dtype": "float32",
            "nested_offset": offset,
        }
        return torch.tensor(list(json.dumps(values).encode().ljust(STATE_BYTES)), dtype=torch.uint8)

    def to_list(self) -> list[Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        return [self.kind, self.out_features, self.in_features, dtype, self.transposed]


def _part_names(name: str, kind: str) -> list[str]:
    if kind == "int8":
        return [name, f"{name.removesuffix('weight')}SCB"]
    return [name, f"{name}.absmax", f"{name}.nested_absmax"]


def _state_name(name: str, kind: str) -> str:
    return f"{name}.quant_state.{'bitsandbytes' if kind == 'nf4' else 'lora'}__{kind}"


def packed_metadata(forms: dict[str, Form]) -> dict[str, str]:
    """What a file says of the packed weights in it."""
    return {PACKED: json.dumps({name: form.to_list() for name, form in forms.items()})} if forms else {}


class WeightFile:
    """One file: the weights that it stands for, whichever way it holds them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.forms = _forms(path)
        held = {entry.name: entry for form_name, form in self.forms.items() for entry in form.entries(form_name)}
        table = {entry.name: entry for entry in tensor_table(path)}
        if not held.keys() <= table.keys():
            raise StorageError(f"{path} lacks {', '.join(sorted(held.keys() - table.keys())[:3])}")
        self.names = list(table)  # of all that is in it
        self.entries = [self._dense(entry) for name, entry in table.items() if name not in held or name in self.forms]

    @cached_property
    def _handle(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            message = f"{self.path} is not a readable safetensors file: {error}"
            raise StorageError(message, "download it again") from error

    def _dense(self, entry: Entry) -> Entry:
        form = self.forms.get(entry.name)
        return entry if form is None else Entry(entry.name, NAMES[form.dtype], form.shape)

    def tensor(self, name: str) -> Tensor:
        """The weight, dense and as the model wants it."""
        if name not in self.forms:
            return self._handle.get_tensor(name)
        weight_OI = self.packed(name).weight()
        return weight_OI.T if self.forms[name].transposed else weight_OI

    def packed(self, name: str) -> Packed:
        """A packed weight, bit for bit as it was written."""
        form = self.forms[name]
        parts = tuple(self._handle.get_tensor(part) for part in _part_names(name, form.kind))
        if form.kind in BITS:
            state = self._handle.get_tensor(_state_name(name, form.kind))
            offset = json.loads(bytes(state.tolist()))["nested_offset"]
            parts = (*parts, torch.tensor(offset, dtype=torch.float32))
        return Packed(parts, form.kind, (form.out_features, form.in_features), form.dtype)


def _forms(path: Path) -> dict[str, Form]:
    try:
        values = json.loads(metadata_of(path).get(PACKED, "{}"))
        return {
            name: Form(kind, rows, columns, getattr(torch, dtype), transposed)
            for name, (kind, rows, columns, dtype, transposed) in values.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: what it says of its packed weights is not understood") from error


def weight_entries(folder: Path) -> Iterator[Entry]:
    """Every weight that a model's folder stands for."""
    for path in weight_files(folder):
        forms = _forms(path)
        yield from WeightFile(path).entries if forms else tensor_table(path)


def is_packed(folder: Path) -> bool:
    """Whether this tool has packed weights in a model's folder."""
    return any(_forms(path) for path in weight_files(folder))


def packed_weights(folder: Path, wanted: Callable[[str], str | None]) -> dict[str, Packed]:
    """Every packed weight, under what ``wanted`` makes of its name in the file."""
    found = {}
    for path in weight_files(folder):
        file = WeightFile(path)
        for name in file.forms:
            if (known := wanted(name)) is not None:
                found[known] = file.packed(name)
    return found


def dense_weights(folder: Path) -> dict[str, Tensor]:
    """Every weight of a folder, dense, by the names of its files."""
    files = [WeightFile(path) for path in weight_files(folder)]
    return {entry.name: file.tensor(entry.name) for file in files for entry in file.entries}
