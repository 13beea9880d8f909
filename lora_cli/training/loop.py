"""The loop: a generator of optimizer steps. What happens between them is the caller's part.

The loss of a step is the sum of all token losses of its micro-batches over the number of their supervised
tokens, so 1 x 8, 2 x 4 and 8 x 1 rows are the same step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lora_cli.data.batches import Batch, StepPlan, collate
from lora_cli.data.encoding import Example
from lora_cli.device import memory_errors
from lora_cli.errors import NonFiniteError
from lora_cli.tasks import Task
from lora_cli.training.schedule import lr_multiplier

# float16 loses gradients below 6e-8; a power of two moves them up and is taken out again without rounding.
FLOAT16_LOSS_SCALE = 1024.0
MEMORY_CURE = (
    "lower training.per_device_train_batch_size (and raise gradient_accumulation_steps: the result stays the same), "
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
class LoopSettings:
    """What the loop needs of a recipe, resolved to numbers."""

    learning_rate: float
    lr_scheduler_type: str
    warmup_steps: int
    total_steps: int
    max_grad_norm: float | None
    pad_id: int


def train_steps(
    model: PreTrainedModel,
    task: type[Task],
    examples: list[Example],
    plan: StepPlan,
    optimizer: torch.optim.Optimizer,
    settings: LoopSettings,
    *,
    start: int,
    device: torch.device,
) -> Iterator[Step]:
    """Optimizer steps ``start + 1`` to ``total_steps``.

    Raises ``NonFiniteError`` before an update that would not be finite, ``OutOfMemoryError``.
    """
    for number in range(start, settings.total_steps):
        began = time.perf_counter()
        multiplier = lr_multiplier(settings.lr_scheduler_type, number, settings.total_steps, settings.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * multiplier
        micro_batches = [collate(rows, settings.pad_id) for rows in plan.micro_batches(examples, number)]
        with memory_errors(MEMORY_CURE):
            loss, grad_norm = train_step(model, task, micro_batches, optimizer, settings.max_grad_norm, device)
        yield Step(
            number + 1,
            loss,
            sum(batch.num_targets for batch in micro_batches),
            sum(batch.num_tokens for batch in micro_batches),
            grad_norm,
            settings.learning_rate * multiplier,
            time.perf_counter() - began,
        )


def train_step(
    model: PreTrainedModel,
    task: type[Task],
    micro_batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    device: torch.device,
) -> tuple[float, float]:
    """Forward, backward and update. Returns (mean loss over all targets, gradient norm before clipping)."""
    optimizer.zero_grad(set_to_none=True)
    losses = accumulate_gradients(model, task, micro_batches, device)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    _check_finite(losses, float(grad_norm), micro_batches)
    if max_grad_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    optimizer.step()
    return sum(losses), float(grad_norm)


def accumulate_gradients(
    model: PreTrainedModel, task: type[Task], micro_batches: list[Batch], device: torch.device
) -> list[float]:
    """Leave the gradient of (sum of losses) / (number of targets) in the parameters.

    Returns each micro-batch's share of that mean.
    """
    num_targets = sum(batch.num_targets for batch in micro_batches)
    scale = FLOAT16_LOSS_SCALE if _computes_float16(model) else 1.0
    losses = []
    for batch in micro_batches:
        loss = task.loss_sum(model, batch.to(device)) / num_targets
        (loss * scale).backward()
        losses.append(float(loss.detach()))
    if scale != 1.0:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(scale)
    return losses


def _computes_float16(model: PreTrainedModel) -> bool:
    return any(p.dtype == torch.float16 for p in model.parameters())


def _check_finite(losses: list[float], grad_norm: float, micro_batches: list[Batch]) -> None:
    """Stop before the update, naming the rows whose loss is not finite (all of the step's, if only the gradient is)."""
    if all(map(_is_finite, [*losses, grad_norm])):
        return
    guilty = [b for b, loss in zip(micro_batches, losses, strict=True) if not _is_finite(loss)]
    what = "loss" if guilty else "gradient"
    rows = [where for batch in (guilty or micro_batches) for where in batch.where]
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    raise NonFiniteError(
        f"the {what} is not finite; the update was not made. Rows of the step: {shown}",
        "lower training.learning_rate, use model.dtype: float32, or look at these rows",
    )


def _is_finite(value: float) -> bool:
    return value - value == 0.0
