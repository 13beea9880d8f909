"""This tool: the product's own loop, and the same with one idea switched off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

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
from lora_cli.fusion.proof import build_network
from lora_cli.models import head_modules
from lora_cli.ops.products import choose_products
from lora_cli.recipe import LoraSection, TrainingSection
from lora_cli.tasks import TASKS
from lora_cli.training.loop import LoopSettings, train_steps
from lora_cli.training.optimizer import FlatAdamW
from tests.benchmarks.contenders.job import Job
from tests.benchmarks.shapes import ALPHA, RANK, Row, Shape


def train(
    job: Job,
    *,
    keep_freed: bool = True,
    attention: str = "auto",
    fused: bool = True,
    compiled: bool = False,
    plain: bool = False,
    shared: bool = True,
    whole: bool = False,
    all_logits: bool = False,
    by_torch: bool = False,
) -> None:
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
    examples = [_example(row, f"row {number}") for number, row in enumerate(job.rows)]
    plan = StepPlan(len(examples), shape.rows_per_step, 1, seed=0, shuffle=False)
    settings = LoopSettings(2e-4, "linear", 0, shape.steps * job.epochs, 1.0, pad_id=0)
    network = build_network(model, shape.task, attention=attention, fused=fused, compile=compiled)
    if not shared:
        network = replace(network, layout=replace(network.layout, share=0))
    if whole:
        network = replace(network, layout=replace(network.layout, looks_at=None))
    if all_logits:
        network = replace(network, head=None)
    if by_torch:  # which is in no need of fewer sizes
        choose_products((), torch.float32, job.device)
        network = replace(network, layout=replace(network.layout, multiple=1))
    optimizer = FlatAdamW(model, TrainingSection())
    task = TASKS[shape.task]
    for _ in train_steps(network, task, examples, plan, optimizer, settings, start=0, device=job.device):
        job.tick()


def train_plain(job: Job) -> None:
    train(job, plain=True)


def train_compiled(job: Job) -> None:
    train(job, compiled=True)


def train_whole(job: Job) -> None:
    train(job, whole=True)


def train_all_logits(job: Job) -> None:
    train(job, all_logits=True)


def train_padded(job: Job) -> None:
    train(job, attention="sdpa")


def train_unfused(job: Job) -> None:
    train(job, fused=False)


def train_unshared(job: Job) -> None:
    train(job, shared=False)


def train_as_torch_multiplies(job: Job) -> None:
    train(job, by_torch=True)


def train_giving_back(job: Job) -> None:
    train(job, keep_freed=False)


def adapted(model: Any, shape: Shape) -> Any:
    """Adapters on the shape's targets, the rest frozen; a classifier's head is trained in full, as PEFT does."""
    of_shape = {"use_dora": shape.use_dora, "lora_dropout": shape.dropout}
    lora = LoraSection(r=RANK, lora_alpha=ALPHA, target_modules=list(shape.targets), **of_shape)
    saved = head_modules(model, shape.task)
    attach(model, find_targets(model, lora, saved), parametrisation(lora))
    freeze_base(model, saved)
    initialise(adapters_of(model), lora, 0)
    return model


def _example(row: Row, where: str) -> Example:
    supervised = (np.arange(len(row.ids)) >= row.prompt) & (row.label is None)
    return Example(np.asarray(row.ids, dtype=np.int32), supervised, where, row.label)
