"""This tool: the product's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lora_cli import device
from lora_cli.adapters.initialisation import initialise
from lora_cli.adapters.injection import (
    adapters_of,
    attach,
    freeze_base,
    packable_modules,
    parametrisation,
    quantize,
)
from lora_cli.adapters.targets import find_targets
from lora_cli.data.batches import StepPlan
from lora_cli.data.encoding import Example
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_network
from lora_cli.models import head_modules
from lora_cli.recipe import LoraSection, TrainingSection
from lora_cli.tasks import TASKS
from lora_cli.training.loop import LoopSettings, Step, train_steps
from lora_cli.training.optimizer import FlatAdamW
from tests.benchmarks.contenders.job import Job
from tests.benchmarks.shapes import ALPHA, RANK, Row, Shape

Change = Callable[[Network, Job], Network]


def train(job: Job, **options: Any) -> None:
    for _ in steps(job, job.epochs, **options):
        job.tick()


def train_plain(job: Job) -> None:
    train(job, plain=True)


def steps(
    job: Job,
    passes: int,
    *,
    keep_freed: bool = True,
    plain: bool = False,
    change: Change = lambda network, job: network,
    optimizer_type: type[FlatAdamW] = FlatAdamW,
    **ways: Any,
) -> Iterator[Step]:
    """The product's own loop on a model of its own, as many passes as asked for. The model is built at once.

    ``change`` changes the network that was built the fastest of the given ``ways``.
    """
    if keep_freed:
        device.keep_freed_memory()
        device.keep_fewer_kernels()
    shape = job.shape
    if plain:
        shape = shape.plain
    model = job.load()
    if shape.quantization != "none":
        quantize(model, packable_modules(model, head_modules(model, shape.task)), shape.quantization)
        device.give_back_freed_memory()
        job.loaded(model)
    model = adapted(model, shape).to(job.device)
    model.train()
    rows = examples(job)
    plan = StepPlan(len(rows), shape.rows_per_step, 1, seed=0, shuffle=False)
    settings = LoopSettings(2e-4, "linear", 0, shape.steps * passes, 1.0, pad_id=0)
    network = change(build_network(model, shape.task, **ways), job)
    optimizer = optimizer_type(model, TrainingSection())
    return train_steps(network, TASKS[shape.task], rows, plan, optimizer, settings, start=0, device=job.device)


def adapted(model: Any, shape: Shape) -> Any:
    """Adapters on the shape's targets, the rest frozen; a classifier's head is trained in full, as PEFT does."""
    of_shape: dict[str, Any] = {"use_dora": shape.use_dora, "lora_dropout": shape.dropout}
    if shape.top is not None:
        of_shape["layers_to_transform"] = shape.adapted_layers
    lora = LoraSection(r=RANK, lora_alpha=ALPHA, target_modules=list(shape.targets), **of_shape)
    saved = head_modules(model, shape.task)
    attach(model, find_targets(model, lora, saved), parametrisation(lora))
    freeze_base(model, saved)
    initialise(adapters_of(model), lora, 0)
    return model


def examples(job: Job) -> list[Example]:
    return [_example(row, f"row {number}") for number, row in enumerate(job.rows)]


def _example(row: Row, where: str) -> Example:
    supervised = (np.arange(len(row.ids)) >= row.prompt) & (row.label is None)
    return Example(np.asarray(row.ids, dtype=np.int32), supervised, where, row.label)
