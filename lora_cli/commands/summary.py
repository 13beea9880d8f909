"""The figures that a run ends with."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

import lora_cli
from lora_cli.adapters.backbone import LoftQReport
from lora_cli.commands.plan import Plan
from lora_cli.tasks import Metrics
from lora_cli.training.checkpoint import State


@dataclass(frozen=True)
class Summary:
    """``summary.json``: the figures that a run ends with."""

    before: Metrics
    after: Metrics
    metric_for_best_model: str
    best_step: int | None
    steps: int
    total_steps: int
    epochs: float
    stopped_early: bool
    train_loss: float | None
    tokens: int
    tokens_per_second: float
    train_seconds: float
    peak_memory_bytes: int  # of the process that took most
    parameters: dict[str, float]
    rows: dict[str, int]
    device: str
    dtype: str
    result: str
    versions: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    loftq: dict[str, float] | None = None  # bits, iterations, and the median of the layers' relative errors

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(
    plan: Plan,
    result: Path,
    state: State,
    lines: list[dict[str, Any]],
    peaks: list[int],
    loftq: LoftQReport | None = None,
) -> Summary:
    """The figures of a run that is finished; ``lines`` are those of metrics.jsonl, ``peaks`` of memory by process."""
    counted = plan.model.counted
    losses = [line["loss"] for line in lines if "loss" in line]
    return Summary(
        before=state.before,
        after=state.best.metrics if state.best else {},
        metric_for_best_model=plan.recipe.training.metric_for_best_model,
        best_step=state.best.step if state.best else None,
        steps=state.step,
        total_steps=plan.total_steps,
        epochs=plan.steps.epoch_of(state.step),
        stopped_early=state.stopped_early,
        train_loss=losses[-1] if losses else None,
        tokens=state.tokens,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        train_seconds=state.seconds,
        peak_memory_bytes=max(peaks),
        parameters={"total": counted.total, "trainable": counted.trainable, "percent": counted.percent},
        rows={"train": len(plan.dataset.train), "eval": len(plan.dataset.eval)},
        device=plan.device.type,
        dtype=str(plan.dtype).removeprefix("torch."),
        result=os.fspath(result),
        versions=versions(),
        processes=len(peaks),
        loftq=loftq.figures if loftq else None,
    )


def versions() -> dict[str, str]:
    return {
        "lora-cli": lora_cli.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
    }
