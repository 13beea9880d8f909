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

from lora_cli.adapters.files import load_trained, read_adapter, save_adapter, tensors_of, trained_tensors
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
    ) -> None:
        """Write a checkpoint as a whole, then remove those that are no longer kept."""
        with new_folder(self.path(state.step), replace=True) as folder:
            save_trained(folder, trained_tensors(model), adapter_config)
            save_file(optimizer.tensors(), folder / "optimizer.safetensors")
            save_file(rng_tensors(), folder / "rng.safetensors")
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
    values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    best = values.pop("best")
    return State(**values, best=Best(**best) if best else None)


def restore(folder: Path, model: nn.Module, optimizer: FlatAdamW) -> None:
    """Put weights, moments and random generators back as they were."""
    load_trained(model, read_trained(folder))
    optimizer.load(load_file(folder / "optimizer.safetensors"))
    set_rng(load_file(folder / "rng.safetensors"))


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


def set_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
