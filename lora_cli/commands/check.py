"""`lora check`: everything that can be known before training, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lora_cli.commands.autosize import is_auto, planned
from lora_cli.commands.memory import MemoryPlan, MemoryPlanner, memory_note
from lora_cli.commands.output import OutputFolder
from lora_cli.commands.plan import Plan, make_plan
from lora_cli.data.dataset import Counts
from lora_cli.data.encoding import Example
from lora_cli.distributed import World
from lora_cli.launch import check_devices
from lora_cli.recipe import LoadedRecipe
from lora_cli.storage import free_bytes


@dataclass(frozen=True)
class Spread:
    """Least, median and most of a quantity over rows."""

    minimum: int
    median: int
    maximum: int


@dataclass(frozen=True)
class Excerpt:
    """One row as the model sees it: pieces of text, and whether each is supervised."""

    where: str
    pieces: list[tuple[str, bool]]


@dataclass(frozen=True)
class Check:
    """A plan with the figures that only a check shows."""

    plan: Plan
    tokens: Spread
    targets: Spread
    free_bytes: int
    excerpt: Excerpt
    memory: MemoryPlan

    @property
    def memory_note(self) -> str | None:
        return memory_note(self.memory, self.plan)

    def to_dict(self) -> dict[str, Any]:
        """What ``lora check --json`` prints."""
        plan = self.plan
        return {
            "task": plan.recipe.task,
            "method": plan.recipe.method,
            "model": plan.recipe.model.name,
            "format": plan.dataset.format,
            "train": _counts(plan.dataset.train_counts),
            "eval": _counts(plan.dataset.eval_counts),
            "tokens_per_row": asdict(self.tokens),
            "targets_per_row": asdict(self.targets),
            "labels": plan.labels,
            "targets": [asdict(target) for target in plan.model.targets],
            "modules_to_save": plan.model.saved,
            "trainable_token_indices": plan.model.rows,
            "parameters": {
                "total": plan.model.counted.total,
                "learnable": plan.model.counted.trainable,
                "percent": round(plan.model.counted.percent, 4),
            },
            "steps": plan.total_steps,
            "steps_per_epoch": plan.steps.steps_per_epoch,
            "warmup_steps": plan.warmup_steps,
            "rows_per_step": plan.steps.rows_per_step,
            "processes": plan.steps.num_processes,
            "device": plan.device.type,
            "dtype": str(plan.dtype).removeprefix("torch."),
            "quantization": "loftq" if plan.has_backbone else plan.recipe.model.quantization,
            "disk_bytes": plan.disk_bytes,
            "free_bytes": self.free_bytes,
            "memory": self.memory.to_dict(),
            "notes": [*plan.notes, *([self.memory_note] if self.memory_note else [])],
        }


def check(loaded: LoadedRecipe, *, remote_code: bool = False, processes: int = 1) -> Check:
    """Do what `lora train` does before its first step, in each of so many processes of one machine.

    Raises the same errors.
    """
    output = OutputFolder(loaded.recipe.output_path, loaded.recipe.method)
    output.check_usable()
    world, on_cpu = World(size=processes, local_size=processes), loaded.recipe.training.use_cpu
    check_devices(processes, on_cpu)
    world.take_device(on_cpu)
    plan = make_plan(loaded, remote_code=remote_code, world=world)
    examples = plan.dataset.train
    planner = MemoryPlanner(plan, remote_code=remote_code, sharing=processes)
    memory = planned(planner)[0][1] if is_auto(plan) else planner.memory()
    return Check(
        plan,
        spread([len(example.input_ids) for example in examples]),
        spread([example.num_targets for example in examples]),
        free_bytes(output.root),
        excerpt(examples[0], plan),
        memory,
    )


def spread(values: list[int]) -> Spread:
    return Spread(min(values), int(np.median(values)), max(values))


def excerpt(example: Example, plan: Plan) -> Excerpt:
    pieces = [
        (plan.tokenizer.decode(example.input_ids[start:end]), bool(example.supervised[start]))
        for start, end in _runs(example.supervised)
    ]
    return Excerpt(example.where, pieces)


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches of equal values, as (start, end)."""
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    yield from pairwise(edges)


def _counts(counts: Counts) -> dict[str, Any]:
    return asdict(counts) | {"bad": [str(row) for row in counts.bad]}
