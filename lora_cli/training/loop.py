"""The loop: a generator of optimizer steps. What happens between them is the caller's part.

The loss of a step is the sum of all token losses of its micro-batches over the number of their supervised
tokens, so 1 x 8, 2 x 4 and 8 x 1 rows are the same step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lora_cli.data.batches import Batch, StepPlan, collate
from lora_cli.data.encoding import Example
from lora_cli.device import memory_errors
from lora_cli.distributed import ALONE, World
from lora_cli.errors import LoraError, NonFiniteError
from lora_cli.fusion.network import Network
from lora_cli.tasks import Task
from lora_cli.training.optimizer import FlatAdamW
from lora_cli.training.schedule import lr_multiplier
from lora_cli.training.signals import STOPPING, StopRequest

# float16 loses gradients below 6e-8; a power of two moves them up and is taken out again without rounding.
FLOAT16_LOSS_SCALE = 1024.0
MEMORY_CURE = (
    "lower training.per_device_train_batch_size (and raise gradient_accumulation_steps where no global_batch_size "
    "is set: the result stays the same), "
    "lower dataset.max_length, or set training.gradient_checkpointing: true"
)


@dataclass(frozen=True)
class Step:
    """One finished optimizer step."""

    number: int  # counted from 1
    loss: float  # mean over its targets, nats
    num_targets: int
    num_tokens: int
    grad_norm: float  # before clipping
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class StepBatches:
    """What one process runs in a step, on the host."""

    rows: list[Example]  # of all processes
    share: list[Batch]
    filling: list[Batch]  # so that it runs as many as the others, where layers lie in pieces that all gather at once

    @property
    def num_targets(self) -> int:
        return sum(example.num_targets for example in self.rows)


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of a recipe, resolved to numbers."""

    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    total_steps: int
    max_grad_norm: float | None
    pad_id: int


def train_steps(
    network: Network,
    task: type[Task],
    examples: list[Example],
    plan: StepPlan,
    optimizer: FlatAdamW,
    settings: LoopSettings,
    *,
    start: int,
    device: torch.device,
    world: World = ALONE,
    stop: StopRequest | None = None,
) -> Iterator[Step]:
    """Optimizer steps ``start + 1`` to ``total_steps``. While the device is busy with one, the next is laid out.

    Raises ``NonFiniteError`` before an update that would not be finite, ``OutOfMemoryError``. After each step
    all processes know of the same request to ``stop``.
    """

    lay_out = partial(step_batches, network, examples, plan, settings.pad_id, world)
    upcoming = [lay_out(start)] if start < settings.total_steps else []
    for number in range(start, settings.total_steps):
        began = time.perf_counter()
        multiplier = lr_multiplier(settings.lr_scheduler_type, number, settings.total_steps, settings.warmup_steps)
        optimizer.set_learning_rate(settings.learning_rate * multiplier)
        batches = upcoming.pop()

        def meanwhile(next_number: int = number + 1) -> None:
            if next_number < settings.total_steps:
                upcoming.append(lay_out(next_number))

        with memory_errors(MEMORY_CURE):
            loss, grad_norm = train_step(
                network,
                task,
                batches.share,
                optimizer,
                settings.max_grad_norm,
                device,
                num_targets=batches.num_targets,
                filling=batches.filling,
                world=world,
                stop=stop,
                meanwhile=meanwhile,
            )
        yield Step(
            number + 1,
            loss,
            batches.num_targets,
            sum(len(example.input_ids) for example in batches.rows),
            grad_norm,
            settings.learning_rate * multiplier,
            time.perf_counter() - began,
        )


def step_batches(
    network: Network, examples: list[Example], plan: StepPlan, pad_id: int, world: World, number: int
) -> StepBatches:
    """What this process runs in the step that follows ``number`` finished ones."""
    rows = plan.rows(examples, number)
    share = [collate(part, pad_id, network.layout) for part in plan.micro_batches(examples, number, world)]
    idle = plan.num_micro_batches(number, world) - len(share) if network.sharded else 0
    return StepBatches(rows, share, [collate(rows[-1:], pad_id, network.layout) for _ in range(idle)])


def train_step(
    network: Network,
    task: type[Task],
    micro_batches: list[Batch],
    optimizer: FlatAdamW,
    max_grad_norm: float | None,
    device: torch.device,
    *,
    num_targets: int | None = None,
    filling: Sequence[Batch] = (),
    world: World = ALONE,
    stop: StopRequest | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[float, float]:
    """Forward, backward and update. Returns (mean loss over all targets, gradient norm before clipping).

    ``micro_batches`` are this process's, ``num_targets`` counts those of all. Everything that the processes
    have to tell one another travels in one sum: gradients, loss and requests to stop. The device is asked for
    figures once, when everything is on its way; what the host can do ``meanwhile`` it does first.
    """
    optimizer.zero_gradients()
    losses = accumulate_gradients(network, task, micro_batches, device, num_targets=num_targets, filling=filling)
    if (scale := loss_scale(network)) != 1.0:
        optimizer.gradients.div_(scale)
    loss, votes = optimizer.aside[0], optimizer.aside[1 : 1 + len(STOPPING)]
    if losses:
        loss.copy_(torch.stack(losses).sum())
    if stop is not None and stop.noted is not None:
        votes.copy_(torch.tensor(stop.votes))
    world.add(optimizer.exchanged)
    norm = optimizer.gradient_norm()
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    if max_grad_norm is not None:
        optimizer.clip(norm, max_grad_norm)
    optimizer.update(finite)
    figures = torch.cat([loss[None], norm[None], votes])
    if meanwhile is not None:
        meanwhile()
    total, grad_norm, *counted = figures.tolist()
    if stop is not None:
        stop.count(counted)
    if not (math.isfinite(total) and math.isfinite(grad_norm)):
        raise _non_finite([float(loss) for loss in losses], micro_batches, world, loss_is_finite=math.isfinite(total))
    return total, grad_norm


def accumulate_gradients(
    network: Network,
    task: type[Task],
    micro_batches: list[Batch],
    device: torch.device,
    *,
    num_targets: int | None = None,
    filling: Sequence[Batch] = (),
) -> list[Tensor]:
    """Add the gradient of (sum of losses) / (number of targets) to the parameters' own.

    Returns each micro-batch's share of that mean, on the device. The gradients are larger by ``loss_scale``.
    The ``filling`` is run as well, and adds nothing.
    """
    num_targets = num_targets or sum(batch.num_targets for batch in micro_batches)
    scale, losses = loss_scale(network), []
    for batch in micro_batches:
        loss = task.loss_sum(network, batch.to(device)) / num_targets
        (loss * scale).backward()
        losses.append(loss.detach())
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=bool(filling)):
        for batch in filling:  # draws no dropout that the next batch would have drawn
            (task.loss_sum(network, batch.to(device)) * 0.0).backward()
    return losses


def loss_scale(network: Network) -> float:
    return FLOAT16_LOSS_SCALE if any(p.dtype == torch.float16 for p in network.model.parameters()) else 1.0


def _non_finite(losses: list[float], micro_batches: list[Batch], world: World, *, loss_is_finite: bool) -> LoraError:
    """Names the rows whose loss is not finite (all of the step's, if only the gradient is), whoever has them."""
    guilty = [b for b, loss in zip(micro_batches, losses, strict=True) if not math.isfinite(loss)]
    what = "gradient" if loss_is_finite else "loss"
    rows = _rows_of(guilty, world) or _rows_of(micro_batches, world)
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    return world.shared(
        NonFiniteError(
            f"the {what} is not finite; the update was not made. Rows of the step: {shown}",
            "lower training.learning_rate, use model.dtype: float32, or look at these rows",
        )
    )


def _rows_of(batches: list[Batch], world: World) -> list[str]:
    gathered = world.gather([where for batch in batches for where in batch.where])
    return [where for rows in gathered for where in rows]
