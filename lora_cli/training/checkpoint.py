"""Checkpoints: everything a run needs to go on, whole or not there.

step-000120/  adapter_config.json, adapter_model.safetensors   (full and head: trained.safetensors)
              optimizer.safetensors, rng.safetensors, state.json, manifest.json
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.adapter import tensors_of
from lora_cli.adapters.files import load_trained, read_adapter, save_adapter, trained_tensors
from lora_cli.adapters.injection import adapters_of
from lora_cli.distributed import ALONE, World
from lora_cli.errors import StorageError
from lora_cli.storage import is_intact, new_folder, write_json
from lora_cli.tasks import Metrics
from lora_cli.training.optimizer import FlatAdamW


@dataclass
class Best:
    step: int
    value: float
    metrics: Metrics


@dataclass
class State:
    """Where a run stands. What is a pure function of the step (data order, learning rate) is not in it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated_step: int = -1  # the step of the newest finished evaluation
    before: Metrics = field(default_factory=dict)
    best: Best | None = None
    evaluations_without_improvement: int = 0
    stopped_early: bool = False
    window: dict[str, float] = field(default_factory=dict)  # sums since the last line of metrics
    metrics_bytes: int = 0
    micro_batch_size: int = 0  # where it was chosen for the recipe; 0 before that
    run: dict[str, Any] = field(default_factory=dict)  # what must not change between sessions


class Checkpoints:
    """The ``checkpoints`` folder of a run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        names = [entry.name for entry in self.folder.glob("step-*")] if self.folder.is_dir() else []
        return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())

    def newest(self) -> tuple[Path, State] | None:
        """The newest checkpoint whose every file has its size and hash, and its state."""
        for step in reversed(self.steps()):
            if is_intact(self.path(step)):
                return self.path(step), read_state(self.path(step))
        return None

    def intact(self, step: int) -> Path:
        """One checkpoint's folder. Raises ``StorageError`` where a file of it is missing or not as it was written."""
        if not is_intact(self.path(step)):
            raise StorageError(f"the checkpoint {self.path(step)} is damaged", "type --fresh to train again")
        return self.path(step)

    def save(
        self,
        model: nn.Module,
        optimizer: FlatAdamW,
        state: State,
        adapter_config: dict[str, Any] | None,
        rng: dict[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint as a whole, then remove those that are no longer kept.

        ``rng``: the generators of all processes, where this one is not alone.
        """
        with new_folder(self.path(state.step), replace=True) as folder:
            save_trained(folder, trained_tensors(model), adapter_config)
            save_file(optimizer.tensors(), folder / "optimizer.safetensors")
            save_file(rng or rng_tensors(), folder / "rng.safetensors")
            write_json(folder / "state.json", asdict(state))
        self._prune(state)

    def _prune(self, state: State) -> None:
        """Remove what is neither among the newest nor the best; what lies ahead is damaged, or this run had used it."""
        done = [step for step in self.steps() if step <= state.step]
        kept = {*done[-self.keep :], state.best.step if state.best else None}
        for step in self.steps():
            if step not in kept:
                shutil.rmtree(self.path(step), ignore_errors=True)


def read_state(folder: Path) -> State:
    return state_of(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def state_of(values: dict[str, Any]) -> State:
    """From what ``asdict`` made of a state."""
    best = values["best"]
    return State(**values | {"best": Best(**best) if best else None})


def restore(folder: Path, model: nn.Module, optimizer: FlatAdamW, world: World = ALONE) -> None:
    """Put weights, moments and random generators back as they were. The main process reads, and tells the others.

    Generators of another number of processes fit nobody: they are left as they are.
    """
    states: dict[str, Tensor] = {}
    with world.together():
        if world.is_main:
            load_trained(model, read_trained(folder))
            optimizer.load(load_file(folder / "optimizer.safetensors"))
            states = load_file(folder / "rng.safetensors")
    optimizer.spread(world)
    for layer in adapters_of(model).values():
        for start in (layer.start_A, layer.start_B):
            if isinstance(start, Tensor):
                world.spread(start)
    mine = spread_rng(states, world)
    if mine:
        set_rng(mine)


def save_trained(folder: Path, tensors: dict[str, Tensor], adapter_config: dict[str, Any] | None) -> None:
    if adapter_config is not None:
        save_adapter(folder, tensors, adapter_config)
    else:
        save_file(tensors, folder / "trained.safetensors")


def read_trained(folder: Path) -> dict[str, Tensor]:
    plain = folder / "trained.safetensors"
    return load_file(plain) if plain.is_file() else tensors_of(read_adapter(folder))


def rng_tensors() -> dict[str, Tensor]:
    """The generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def gathered_rng(world: World) -> dict[str, Tensor]:
    """The generators of all processes: the main one's under their plain names, the others' with their rank."""
    mine = {name: state.numpy().tobytes().hex() for name, state in rng_tensors().items()}
    return {
        f"{name}/{rank}" if rank else name: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        for rank, states in enumerate(world.gather(mine))
        for name, text in states.items()
    }


def spread_rng(states: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """This process's part of the states that the main one read; nothing where they are another number's."""
    texts = {name: state.numpy().tobytes().hex() for name, state in states.items()}
    told: dict[str, str] = world.tell(texts)
    if sum(name.partition("/")[0] == "cpu" for name in told) != world.size:
        return {}
    return {
        name.partition("/")[0]: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        for name, text in told.items()
        if (name.partition("/")[2] or "0") == str(world.rank)
    }


def set_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
