"""`lora shrink`: an adapter of lower rank that keeps as much of every update as that rank can."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_cli.adapters.adapter import Adapter
from lora_cli.adapters.configuration import rewritten
from lora_cli.adapters.shrinking import Shrunk, shrink_update
from lora_cli.adapters.spectrum import frobenius_norm, singular_values
from lora_cli.commands.adapter_folder import TOKENIZER_FILES, check_new, copy_files, read_low_rank, write_adapter
from lora_cli.errors import UsageError
from lora_cli.storage import new_folder


@dataclass(frozen=True)
class ModuleShrink:
    """One module: its rank before and after, and the share of its squared singular values that was kept."""

    name: str
    rank_before: int
    rank: int
    energy: float


@dataclass(frozen=True)
class ShrinkReport:
    """What `lora shrink` did."""

    adapter: str
    output: str
    parameters_before: int  # of A and B
    parameters: int
    energy: float  # of all updates together
    modules: list[ModuleShrink]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def shrink(folder: Path, output: Path, *, rank: int | None = None, keep_energy: float | None = None) -> ShrinkReport:
    """Write an adapter of a rank of at most ``rank``, or of the least ranks that keep ``keep_energy`` (0 to 1).

    Raises ``UsageError`` for flags that make no sense together, DoRA, numbers that are not finite, and a folder that
    exists.
    """
    _check_wish(rank, keep_energy)
    check_new(output)
    adapter = read_low_rank(
        folder, "its magnitudes belong to the norm of base + update, which another update would change"
    )
    made = {name: shrink_update(update, rank=rank, keep_energy=keep_energy) for name, update in adapter.updates.items()}
    _write(folder, output, adapter, made)
    return _report(folder, output, adapter, made)


def _check_wish(rank: int | None, keep_energy: float | None) -> None:
    if (rank is None) == (keep_energy is None):
        what = "say how far to shrink" if rank is None else "--rank and --keep-energy cannot both say how far to shrink"
        raise UsageError(what, "give one of --rank 4 and --keep-energy 0.99")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank} is no rank", "give 1 or more")
    if keep_energy is not None and not 0 < keep_energy <= 1:
        raise UsageError(f"--keep-energy {keep_energy} is no share", "give more than 0 and at most 1, such as 0.99")


def _write(folder: Path, output: Path, adapter: Adapter, made: dict[str, Shrunk]) -> None:
    updates = {name: shrunk.update for name, shrunk in made.items()}
    ranks = {name: update.lora_A.shape[0] for name, update in updates.items()}
    scalings = {name: update.scaling for name, update in updates.items()}
    config = rewritten(adapter.config, ranks, scalings, saved=True)
    with new_folder(output) as temporary:
        write_adapter(temporary, updates, adapter.saved, config, folder)
        copy_files(TOKENIZER_FILES, folder, temporary)


def _report(folder: Path, output: Path, adapter: Adapter, made: dict[str, Shrunk]) -> ShrinkReport:
    squares = {name: frobenius_norm(singular_values(update)) ** 2 for name, update in adapter.updates.items()}
    total = sum(squares.values())
    kept = sum(made[name].energy * square for name, square in squares.items())
    return ShrinkReport(
        adapter=os.fspath(folder),
        output=os.fspath(output),
        parameters_before=sum(t.numel() for u in adapter.updates.values() for t in u.tensors.values()),
        parameters=sum(t.numel() for s in made.values() for t in s.update.tensors.values()),
        energy=kept / total if total else 1.0,
        modules=[
            ModuleShrink(name, adapter.updates[name].lora_A.shape[0], shrunk.update.lora_A.shape[0], shrunk.energy)
            for name, shrunk in made.items()
        ],
    )
