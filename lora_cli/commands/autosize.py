"""``per_device_train_batch_size: auto``: the largest micro-batch that fits, proven before the first step.

Only how a step is cut changes, never its rows: the run is that of the same size written down.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from lora_cli.commands.memory import MARGIN, MemoryPlan, MemoryPlanner
from lora_cli.commands.plan import Plan
from lora_cli.data.batches import StepPlan, collate
from lora_cli.device import give_back_freed_memory, memory_errors, process_bytes
from lora_cli.distributed import World
from lora_cli.errors import OutOfMemoryError
from lora_cli.fusion.network import Network
from lora_cli.tasks import TASKS
from lora_cli.training.checkpoint import rng_tensors, set_rng
from lora_cli.training.loop import MEMORY_CURE, accumulate_gradients
from lora_cli.training.optimizer import FlatAdamW


@dataclass(frozen=True)
class Choice:
    """A step cut into micro-batches that fit, and what the largest of them takes."""

    steps: StepPlan
    peak: int
    limit: int


def is_auto(plan: Plan) -> bool:
    return plan.recipe.training.per_device_train_batch_size == "auto"


def sizes_of(rows: int) -> list[int]:
    """The micro-batches that cut so many rows into parts as equal as can be: the largest of 1, 2, 3 ... parts."""
    return sorted({-(-rows // parts) for parts in range(1, rows + 1)}, reverse=True)


def cut(steps: StepPlan, size: int) -> StepPlan:
    """The same step in micro-batches of so many rows, the last of which may have fewer."""
    accumulation = -(-_share_of(steps) // size)
    return replace(steps, micro_batch_size=size, accumulation=accumulation, global_batch_size=steps.rows_per_step)


def _share_of(steps: StepPlan) -> int:
    """Rows of a step that one process has at most."""
    return -(-steps.rows_per_step // steps.num_processes)


def planned(planner: MemoryPlanner, at_most: int = 0) -> list[tuple[StepPlan, MemoryPlan]]:
    """The largest micro-batch that fits by the plan, with the margin left free, and smaller ones, each at most half.

    The smallest where none fits. Of ``at_most`` rows, where that is not 0: a resumed run begins where it was.
    """
    steps = planner.plan.steps
    sizes = [size for size in sizes_of(_share_of(steps)) if not at_most or size <= at_most]

    @cache
    def memory(size: int) -> MemoryPlan:
        return planner.memory(cut(steps, size))

    def fits(size: int) -> bool:
        limit = memory(size).limit
        return limit is None or memory(size).total <= (1 - MARGIN) * limit

    first = bisect_left(sizes[:-1], True, key=fits)  # smaller ones take less
    chosen = [sizes[first]]
    for size in sizes[first:]:
        if 2 * size <= chosen[-1]:
            chosen.append(size)
    return [(cut(steps, size), memory(sizes[first])) for size in chosen]


def prove(plan: Plan, network: Network, optimizer: FlatAdamW, candidates: list[tuple[StepPlan, MemoryPlan]]) -> Choice:
    """The first candidate whose largest micro-batch goes through; leaves no trace of having tried.

    Raises ``OutOfMemoryError`` where not even the last one does.
    """
    for steps, memory in candidates:
        last = steps is candidates[-1][0]
        try:
            measured = _leaving_no_trace(network, optimizer, lambda steps=steps: _try(plan, steps, network))  # type: ignore[misc]
            measured += optimizer.bytes_to_come
        except OutOfMemoryError:
            if last:
                raise
            continue
        limit = memory.limit or 0
        if measured <= (1 - MARGIN / 2) * limit or last:
            return Choice(steps, measured, limit)
    raise AssertionError("there is always a last one")


def agreed(choice: Choice, world: World) -> Choice:
    """The smallest of the processes' choices, for all of them, and what it takes there."""
    all_choices = world.gather([choice.steps.micro_batch_size, choice.limit - choice.peak, choice.limit])
    size, left, limit = min(all_choices)  # of equal ones, that with the least room
    return Choice(cut(choice.steps, size), limit - left, limit)


def _try(plan: Plan, steps: StepPlan, network: Network) -> int:
    """One forward and backward pass of the run's largest micro-batch; the most memory it had."""
    rows = steps.largest_micro_batch(plan.dataset.train, plan.total_steps, network.layout)
    give_back_freed_memory()  # of loading, or of a trial that failed: it is none of this one's
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    with memory_errors(MEMORY_CURE):
        batch = collate(rows, plan.pad_id, network.layout)
        accumulate_gradients(network, TASKS[plan.recipe.task], [batch], plan.device)
    if plan.device.type == "cuda":
        return torch.cuda.max_memory_reserved(plan.device)
    return process_bytes()  # what this trial freed stays with the process: its C library keeps it


def _leaving_no_trace(network: Network, optimizer: FlatAdamW, action: Callable[[], int]) -> int:
    """Do it in training mode, then put random generators, gradients and mode back as they were."""
    random, reached, training = rng_tensors(), set(optimizer.never_reached), network.model.training
    network.model.train()
    try:
        return action()
    finally:
        network.model.train(training)
        optimizer.zero_gradients()
        optimizer.never_reached = reached
        set_rng(random)
