"""Folding an adapter into the weight files of its base, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.experts import stacked_update
from lora_cli.adapters.layer import fold
from lora_cli.adapters.quantized import Quantization
from lora_cli.adapters.targets import tied_partner
from lora_cli.errors import UsageError
from lora_cli.hub import weight_files
from lora_cli.storage import write_json
from lora_cli.tensorfile import DTYPES, NAMES, Entry, write_tensors
from lora_cli.weights import WeightFile, weight_entries


@dataclass(frozen=True)
class Naming:
    """How the names in a base's files relate to the parameters of the model that loads them."""

    parameters: set[str]
    prefix: str  # base_model_prefix: files saved from the bare base lack it
    keep_foreign: bool  # keep what is no parameter; else drop what belongs to another head

    def parameter(self, key: str) -> str | None:
        """The parameter that a file's tensor becomes."""
        for name in (key, _modern(key)):
            for candidate in (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}.")):
                if candidate in self.parameters:
                    return candidate
        return None

    def written(self, key: str) -> str | None:
        """The name under which it is written again; None where it is left out."""
        parameter = self.parameter(key)
        if parameter is not None:
            return parameter
        return key if self.keep_foreign or key.startswith(f"{self.prefix}.") else None


def _modern(key: str) -> str:
    """Old checkpoints call a LayerNorm's weight gamma and its bias beta."""
    if key.endswith("LayerNorm.gamma"):
        return key.removesuffix("gamma") + "weight"
    return key.removesuffix("beta") + "bias" if key.endswith("LayerNorm.beta") else key


@dataclass(frozen=True)
class Folding:
    """What becomes of a weight: W + s B A in float32, of the base's own W or of what a quantized base made of it."""

    adapter: Adapter
    transposed: set[str]
    onto: Quantization | None = None

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor's shape when it is written: a table grows by the rows of new tokens."""
        table = self.adapter.tokens.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return shape if table is None else (max(shape[0], *(i + 1 for i in table.ids)), *shape[1:])

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """The new value of the base's parameter ``name``: still to be rounded, or the very tensor."""
        if name in self.adapter.saved:
            return self.adapter.saved[name]
        stack = self.adapter.updates.get(name)
        if stack is not None:
            change = stacked_update(stack.lora_A, stack.lora_B, stack.scaling, stack.experts, name in self.transposed)
            return tensor.float() + change
        module, _, last = name.rpartition(".")
        if last != "weight":
            return tensor
        table = self.adapter.tokens.get(module)
        if table is not None:
            written = torch.zeros(self.shape(name, tuple(tensor.shape)))
            written[: len(tensor)] = tensor
            return written.index_copy_(0, torch.tensor(table.ids), table.rows.float())
        transposed = module in self.transposed
        if self.onto is not None and module in self.onto.modules:
            tensor = self.onto.seen(tensor, transposed)
        update = self.adapter.updates.get(module)
        if update is None:
            return tensor
        transposed = transposed or update.is_embedding
        return fold(tensor, update.lora_A, update.lora_B, update.scaling, transposed, update.magnitude)


@torch.no_grad()
def merge_model(model: nn.Module, folding: Folding, stored: torch.dtype, dtype: torch.dtype | None) -> None:
    """The same as ``merge_files`` in a loaded base: rounded as if written as ``stored``, or all of it as ``dtype``."""
    for name, parameter in model.named_parameters():
        value = folding.merged(name, parameter)
        if dtype is not None or value is not parameter:
            parameter.copy_(value.to(dtype or stored))


def merge_files(
    base: Path,
    folder: Path,
    adapter: Adapter,
    naming: Naming,
    transposed: set[str],
    dtype: torch.dtype | None,
    onto: Quantization | None = None,
) -> None:
    """Write the merged weights into ``folder``, in the base's shards, holding one tensor at a time.

    W + s B A is accumulated in float32 and rounded once, to ``dtype`` or the type it is stored in. Raises
    ``UsageError`` for an adapted layer whose weight the files do not hold.
    """
    folding = Folding(adapter, transposed, onto)
    files = weight_files(base)
    missing = _missing(base, adapter, naming)
    weight_map: dict[str, str] = {}
    total = 0
    for path in files:
        shard = _Shard(path, folding, naming, dtype)
        added = missing if path == files[-1] else {}
        total += write_tensors(folder / path.name, [*shard.entries, *_entries(added, dtype)], shard.producer(added))
        weight_map |= dict.fromkeys([*shard.sources, *added], path.name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def with_partners(adapter: Adapter, model: nn.Module) -> Adapter:
    """The adapter with its rows in both tables of a tied pair: files may hold either of them, or both."""
    tokens = dict(adapter.tokens)
    for name, table in adapter.tokens.items():
        if partner := tied_partner(model, name):
            tokens[partner] = table
    return replace(adapter, tokens=tokens)


def _missing(base: Path, adapter: Adapter, naming: Naming) -> dict[str, Tensor]:
    """Parameters trained in full that the base's files do not hold: a new head."""
    held = {naming.parameter(entry.name) for entry in weight_entries(base)}
    absent = [name for name in adapter.updates if f"{name}.weight" not in held]
    written = {id(table) for name, table in adapter.tokens.items() if f"{name}.weight" in held}
    absent += [name for name, table in adapter.tokens.items() if id(table) not in written]  # one of a tied pair will do
    if absent:
        raise UsageError(f"the base's files hold no weight for {', '.join(sorted(absent)[:4])}")
    return {
        name: tensor
        for name, tensor in adapter.saved.items()
        if name not in held
        and not any(other in held and torch.equal(adapter.saved[other], tensor) for other in adapter.saved)
    }


def _entries(tensors: dict[str, Tensor], dtype: torch.dtype | None) -> list[Entry]:
    return [Entry(name, NAMES[dtype or tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


class _Shard:
    """One weight file of the base, and what becomes of each of its tensors."""

    def __init__(self, path: Path, folding: Folding, naming: Naming, dtype: torch.dtype | None) -> None:
        self.file = WeightFile(path)
        self.folding = folding
        self.sources: dict[str, str] = {}  # written name -> name in the base's file
        self.entries: list[Entry] = []
        for entry in self.file.entries:
            if entry.dtype not in DTYPES:
                raise UsageError(f"{path}: {entry.name} is stored as {entry.dtype}, which cannot be merged")
            written = naming.written(entry.name)
            if written is not None:
                self.sources[written] = entry.name
                self.entries.append(Entry(written, _stored_as(entry, dtype), folding.shape(written, entry.shape)))

    def producer(self, added: dict[str, Tensor]):  # type: ignore[no-untyped-def]
        """The function that makes each tensor of the new file."""

        def produce(entry: Entry) -> Tensor:
            if entry.name in added:
                return added[entry.name].to(DTYPES[entry.dtype])
            tensor = self.file.tensor(self.sources[entry.name])
            return self.folding.merged(entry.name, tensor).to(DTYPES[entry.dtype])

        return produce


def _stored_as(entry: Entry, dtype: torch.dtype | None) -> str:
    floating = DTYPES[entry.dtype].is_floating_point
    return NAMES[dtype] if dtype is not None and floating else entry.dtype
