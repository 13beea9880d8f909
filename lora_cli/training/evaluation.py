"""Metrics over held-out rows. Only sums are kept, so memory does not grow with the data set."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_cli.data.batches import Layout, StepPlan, evaluation_batches, tokens_of
from lora_cli.data.encoding import Example
from lora_cli.device import memory_errors
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
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Metrics | None:
    """The task's figures over all examples; None where ``stop`` asked to leave early.

    With the tokens of training's largest micro-batch as ``max_tokens``, no evaluation takes more than a step.
    """
    was_training = network.model.training
    network.model.eval()
    totals: Sums = {}
    try:
        with memory_errors(MEMORY_CURE):
            for batch in evaluation_batches(examples, batch_size, pad_id, network.layout, max_tokens):
                if stop():
                    return None
                for name, value in task.sums(network, batch.to(device)).items():
                    totals[name] = totals[name] + value if name in totals else value
                progress(len(batch.where))
    finally:
        network.model.train(was_training)
    return task.figures(totals)
