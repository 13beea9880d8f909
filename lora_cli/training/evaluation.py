"""Metrics over held-out rows. Only sums are kept, so memory does not grow with the data set.

The batches are those of a single process, dealt out to all of them in turn: each batch gives the same sums
wherever it is run, so the figures do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch

from lora_cli.data.batches import Batch, Layout, StepPlan, evaluation_batches, tokens_of
from lora_cli.data.encoding import Example
from lora_cli.device import memory_errors
from lora_cli.distributed import ALONE, World
from lora_cli.fusion.network import Network
from lora_cli.tasks import Metrics, Sums, Task

MEMORY_CURE = "lower training.per_device_eval_batch_size"


def evaluation_size(
    asked: int | str, plan: StepPlan, examples: list[Example], total_steps: int, layout: Layout
) -> tuple[int, int | None]:
    """(rows of a batch, its tokens at most): no more of either than in training, unless more rows are asked for."""
    size = plan.micro_batch_size if isinstance(asked, str) else asked
    if size > plan.micro_batch_size:
        return size, None
    return size, tokens_of(plan.largest_micro_batch(examples, total_steps, layout), layout)


@torch.no_grad()
def evaluate(
    network: Network,
    task: type[Task],
    examples: list[Example],
    *,
    batch_size: int,
    max_tokens: int | None = None,
    pad_id: int,
    device: torch.device,
    world: World = ALONE,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Metrics | None:
    """The task's figures over all examples; None where ``stop`` asked one of the processes to leave early: all do.

    With the tokens of training's largest micro-batch as ``max_tokens``, no evaluation takes more than a step.
    """
    was_training = network.model.training
    network.model.eval()
    batches = evaluation_batches(examples, batch_size, pad_id, network.layout, max_tokens)
    totals: Sums = {}
    try:
        with memory_errors(MEMORY_CURE):
            while turn := list(islice(batches, world.size)):
                if world.any(stop()):
                    return None
                for name, value in _sums(network, task, turn, device, world).items():
                    totals[name] = totals[name] + value if name in totals else value
                progress(sum(batch.num_rows for batch in turn))
    finally:
        network.model.train(was_training)
    return task.figures(_added(totals, world))


def _sums(network: Network, task: type[Task], turn: list[Batch], device: torch.device, world: World) -> Sums:
    """Those of this process's batch. One that gets none in the last turn runs another's, and counts it not."""
    mine = world.rank < len(turn)
    sums = task.sums(network, turn[world.rank if mine else 0].to(device))
    return sums if mine else {name: torch.zeros_like(value) for name, value in sums.items()}


def _added(totals: Sums, world: World) -> Sums:
    """The sums of all processes. float64 holds every count exactly."""
    if world.size == 1:
        return totals
    vector = world.add(torch.cat([value.detach().cpu().double().flatten() for value in totals.values()]))
    parts = vector.split([value.numel() for value in totals.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(totals.items(), parts, strict=True)}
