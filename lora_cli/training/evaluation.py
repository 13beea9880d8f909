"""Metrics over held-out rows. Only sums are kept, so memory does not grow with the data set."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_cli.data.batches import evaluation_batches
from lora_cli.data.encoding import Example
from lora_cli.device import memory_errors
from lora_cli.fusion.network import Network
from lora_cli.tasks import Metrics, Sums, Task

MEMORY_CURE = "lower training.per_device_eval_batch_size"


@torch.no_grad()
def evaluate(
    network: Network,
    task: type[Task],
    examples: list[Example],
    *,
    batch_size: int,
    pad_id: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Metrics | None:
    """The task's figures over all examples; None where ``stop`` asked to leave early."""
    was_training = network.model.training
    network.model.eval()
    totals: Sums = {}
    try:
        with memory_errors(MEMORY_CURE):
            for batch in evaluation_batches(examples, batch_size, pad_id, network.layout):
                if stop():
                    return None
                for name, value in task.sums(network, batch.to(device)).items():
                    totals[name] = totals[name] + value if name in totals else value
                progress(len(batch.where))
    finally:
        network.model.train(was_training)
    return task.figures(totals)
