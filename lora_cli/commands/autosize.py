"""``per_device_train_batch_size: auto``: the largest micro-batch that fits, proven before the first step.

Only how a step is cut changes, never its rows: the run is that of the same size written down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lora_cli.commands.memory import MARGIN, MemoryPlan, MemoryPlanner
from lora_cli.commands.plan import Plan
from lora_cli.data.batches import StepPlan, collate
from lora_cli.device import memory_errors, process_bytes
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


def cuts(steps: StepPlan, at_most: int = 0) -> list[StepPlan]:
    """The same step in equal micro-batches: the largest first, each at most half of the one before or so.

    ``at_most`` rows, where that is not 0: a resumed run begins where it was.
    """
    rows, found = -(-steps.rows_per_step // steps.num_processes), []
    size = min(rows, at_most or rows)
    while size >= 1:
        if rows % size == 0:
            found.append(replace(steps, micro_batch_size=size, accumulation=rows // size))
            size = max(1, size // 2) if size > 1 else 0
        else:
            size -= 1
    return found


def planned(planner: MemoryPlanner, at_most: int = 0) -> list[tuple[StepPlan, MemoryPlan]]:
    """The cuts that fit by the plan, with the margin left free; the smallest where none does."""
    every = ((steps, planner.memory(steps)) for steps in cuts(planner.plan.steps, at_most))
    last: tuple[StepPlan, MemoryPlan] | None = None
    for last in every:
        if last[1].limit is None or last[1].total <= (1 - MARGIN) * last[1].limit:
            break
    assert last is not None
    smaller = [steps for steps in cuts(planner.plan.steps) if steps.micro_batch_size < last[0].micro_batch_size]
    return [last, *((steps, last[1]) for steps in smaller)]


def prove(plan: Plan, network: Network, optimizer: FlatAdamW, candidates: list[tuple[StepPlan, MemoryPlan]]) -> Choice:
    """The first candidate whose largest micro-batch goes through; leaves no trace of having tried.

    Raises ``OutOfMemoryError`` where not even the last one does.
    """
    for steps, memory in candidates:
        last = steps is candidates[-1][0]
        try:
            measured = _leaving_no_trace(network, optimizer, lambda steps=steps: _try(plan, steps, network))  # type: ignore[misc]
        except OutOfMemoryError:
            if last:
                raise
            continue
        limit = memory.limit or 0
        if measured <= (1 - MARGIN / 2) * limit or last:
            return Choice(steps, measured, limit)
    raise AssertionError("there is always a last one")


def agreed(choice: Choice, world: World) -> Choice:
    """The smallest of the processes' choices, for all of them."""
    sizes = world.gather(choice.steps.micro_batch_size)
    if min(sizes) == choice.steps.micro_batch_size:
        return choice
    rows = choice.steps.micro_batch_size * choice.steps.accumulation
    return replace(choice, steps=replace(choice.steps, micro_batch_size=min(sizes), accumulation=rows // min(sizes)))


def _try(plan: Plan, steps: StepPlan, network: Network) -> int:
    """One forward and backward pass of the run's largest micro-batch; the most memory it had."""
    rows = steps.largest_micro_batch(plan.dataset.train, plan.total_steps, network.layout)
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    with memory_errors(MEMORY_CURE):
        batch = collate(rows, plan.pad_id, network.layout)
        accumulate_gradients(network, TASKS[plan.recipe.task], [batch], plan.device)
    if plan.device.type == "cuda":
        return torch.cuda.max_memory_allocated(plan.device)
    return process_bytes()  # what was freed stays with the process: its C library keeps it


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
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
