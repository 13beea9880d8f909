"""This tool: the product's own loop, and the same with one idea switched off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

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
from lora_cli.fusion.skipping import skipping
from lora_cli.fusion.states import MemoryStates
from lora_cli.models import head_modules
from lora_cli.ops.kernels import Kernels
from lora_cli.ops.low_rank import Projection, low_rank_linear
from lora_cli.ops.products import choose_products
from lora_cli.recipe import LoraSection, TrainingSection
from lora_cli.tasks import TASKS
from lora_cli.training.loop import LoopSettings, train_steps
from lora_cli.training.optimizer import FlatAdamW
from tests.benchmarks.contenders.job import Job
from tests.benchmarks.shapes import ALPHA, RANK, Row, Shape

Change = Callable[[Network], Network]


def train(
    job: Job,
    *,
    keep_freed: bool = True,
    plain: bool = False,
    change: Change = lambda network: network,
    optimizer_type: type[FlatAdamW] = FlatAdamW,
    **ways: Any,
) -> None:
    """``change`` takes something from the network that was built the fastest of the given ``ways``."""
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
    settings = LoopSettings(2e-4, "linear", 0, shape.steps * job.epochs, 1.0, pad_id=0)
    network = change(build_network(model, shape.task, **ways))
    optimizer = optimizer_type(model, TrainingSection())
    for _ in train_steps(network, TASKS[shape.task], rows, plan, optimizer, settings, start=0, device=job.device):
        job.tick()


def train_plain(job: Job) -> None:
    train(job, plain=True)


def train_compiled(job: Job) -> None:
    train(job, kernels=Kernels.COMPILED)


def train_with_liger(job: Job) -> None:
    train(job, kernels=Kernels.LIGER)


def train_padded(job: Job) -> None:
    train(job, attention="sdpa")


def train_unfused(job: Job) -> None:
    train(job, fused=False)


def train_giving_back(job: Job) -> None:
    train(job, keep_freed=False)


def _laid_out(**changes: Any) -> Change:
    return lambda network: replace(network, layout=replace(network.layout, **changes))


def train_whole(job: Job) -> None:
    train(job, change=_laid_out(looks_at=None))


def train_unshared(job: Job) -> None:
    train(job, change=_laid_out(share=0))


def train_all_logits(job: Job) -> None:
    train(job, change=lambda network: replace(network, head=None))


def train_as_torch_multiplies(job: Job) -> None:
    def change(network: Network) -> Network:
        choose_products((), torch.float32, job.device)
        return _laid_out(multiple=1)(network)  # which is in no need of fewer sizes

    train(job, change=change)


def train_apart(job: Job) -> None:
    """Queries, keys and values, gate and up: each A a product, and each projection a node, of its own."""

    def one_by_one(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
        return tuple(output for one in projections for output in low_rank_linear(x, [one]))

    with patch("lora_cli.fusion.forms.low_rank_linear", one_by_one):
        train(job)


class LooseAdamW(FlatAdamW):
    """Clips and updates the parameters one by one, as most trainers do; there is as much to sum and to zero."""

    def __init__(self, model: nn.Module, training: TrainingSection) -> None:
        super().__init__(model, training)
        self.each = [p for p in model.parameters() if p.requires_grad]
        parts = {"lr": training.learning_rate, "weight_decay": training.weight_decay, "lr_ratio": 1.0}
        self._adamw = torch.optim.AdamW([{"params": self.each, **parts}], fused=True)

    def gradient_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.each if p.grad is not None])

    def clip(self, norm: Tensor, max_norm: float) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.each, max_norm, norm)


def train_loose(job: Job) -> None:
    train(job, optimizer_type=LooseAdamW)


def train_through(job: Job) -> None:
    """As where a trainer makes the embeddings' output want a gradient, which recomputing asks of many."""

    def change(network: Network) -> Network:
        embeddings = network.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled()))
        return network

    train(job, change=change)


def train_cached(job: Job) -> None:
    def change(network: Network) -> Network:
        return skipping(network, MemoryStates(), examples(job), job.shape.rows_per_step, 0)

    train(job, change=change)


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
