"""Adapter folders that are read and written without their base."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_cli.adapters.adapter import Adapter, LowRank, tensors_of
from lora_cli.adapters.files import WEIGHTS, read_adapter, save_adapter
from lora_cli.adapters.servers import Files
from lora_cli.adapters.spectrum import is_finite
from lora_cli.commands.provenance import read_provenance
from lora_cli.errors import UsageError
from lora_cli.tensorfile import tensor_table

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)


def check_new(output: Path) -> None:
    if output.exists():
        raise UsageError(f"{output} exists already", "name another folder with -o")


def copy_files(names: Iterable[str], source: Path | None, folder: Path) -> None:
    """Copy those of the files that are there."""
    for name in names:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def files_of(folder: Path, adapter: Adapter) -> Files:
    return Files(adapter.config, {entry.name: entry.shape for entry in tensor_table(folder / WEIGHTS)})


def read_low_rank(folder: Path, why_not_dora: str, help: str | None = None) -> Adapter:
    """An adapter whose updates are s B A and numbers.

    Raises ``UsageError`` for one with DoRA's magnitudes, for the reason given, with rows of word tables, with updates
    of stacked experts or of an embedding, or with numbers that are not finite.
    """
    adapter = read_adapter(folder)
    if not adapter.updates:
        raise UsageError(f"{folder} adapts no layer")
    if any(update.magnitude is not None for update in adapter.updates.values()):
        raise UsageError(f"{folder} is a DoRA adapter: {why_not_dora}", help)
    if adapter.tokens:
        words = sum(len(table.ids) for table in adapter.tokens.values())
        raise UsageError(
            f"{folder} holds {words} rows of word tables (trainable_token_indices), which are no low-rank updates",
            f"merge instead: lora merge {folder}",
        )
    if stacked := [name for name, update in adapter.updates.items() if update.experts > 1]:
        raise UsageError(
            f"{folder} adapts stacked experts ({stacked[0]}): each expert has an update of its own, in a layout that "
            "only training and merging understand",
            f"merge instead: lora merge {folder}",
        )
    if tables := [name for name, update in adapter.updates.items() if update.is_embedding]:
        raise UsageError(
            f"{folder} adapts an embedding ({tables[0]}), which only PEFT and merging are known to read",
            f"merge instead: lora merge {folder}",
        )
    broken = [name for name, update in adapter.updates.items() if not is_finite(update)]
    if broken:
        raise UsageError(
            f"{folder} holds numbers that are not finite, in {len(broken)} modules: {', '.join(broken[:3])}",
            "take an earlier checkpoint of the run",
        )
    return adapter


def write_adapter(
    folder: Path, updates: dict[str, LowRank], saved: dict[str, Tensor], config: dict[str, Any], source: Path
) -> None:
    """Write an adapter made from the one at ``source``, with its word on the base, into an existing folder."""
    save_adapter(folder, tensors_of(Adapter(config, updates, saved)), config)
    provenance = read_provenance(source)
    if provenance.base_fingerprint is not None:
        provenance.write(folder)
