"""Where a run's adapters begin: at their initialisation, or with the ranks of the checkpoint they go on from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lora_cli.adapters.adapter import tensors_of
from lora_cli.adapters.backbone import START
from lora_cli.adapters.files import load_trained, read_adapter
from lora_cli.adapters.initialisation import initialise, kind_of
from lora_cli.adapters.injection import adapters_of
from lora_cli.adapters.tokens import rows_of
from lora_cli.commands.plan import Plan
from lora_cli.data.batches import Batch, collate
from lora_cli.distributed import World
from lora_cli.fusion.network import Network
from lora_cli.seeds import stream
from lora_cli.tasks import TASKS

Ranks = dict[str, int]


def ranks_of(checkpoint: Path | None, plan: Plan) -> Ranks | None:
    """The ranks that a checkpoint's adapters were trained with; None where a run begins, or trains no adapters."""
    if checkpoint is None or plan.recipe.method != "lora":
        return None
    halves = 2 if kind_of(plan.recipe.lora.init_lora_weights).has_start else 1
    updates = read_adapter(checkpoint).updates
    return {name: u.lora_A.shape[0] // (1 if u.is_embedding else halves) for name, u in updates.items()}


@torch.no_grad()
def begin(model: PreTrainedModel, plan: Plan, base: Path, ranks: Ranks | None) -> None:
    """Give every adapter its first values; zeros of the checkpoint's ranks where ``restore`` puts the values in."""
    layers = adapters_of(model)
    if ranks is not None:
        for name, layer in layers.items():
            layer.begin(torch.zeros(ranks[name], layer.lora_A.shape[1]), torch.zeros(len(layer.lora_B), ranks[name]))
        return
    if plan.recipe.lora.init_from is not None:
        adapter = read_adapter(Path(plan.recipe.lora.init_from).expanduser())
        load_trained(model, {name: tensor.float() for name, tensor in tensors_of(adapter).items()})
        return
    initialise(layers, plan.recipe.lora, plan.recipe.training.seed, _TrainingRows(model, plan))
    if plan.has_backbone:
        for name, update in read_adapter(base / START).updates.items():
            layers[name].begin(update.lora_A, update.lora_B)
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def agree_on_beginning(model: PreTrainedModel, world: World) -> None:
    """All processes begin with the main one's values: no two processors need agree on a decomposition's last bit."""
    for module in (*adapters_of(model).values(), *rows_of(model).values()):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            world.spread(tensor)


@dataclass(frozen=True)
class _TrainingRows:
    """The model's own code on training rows of a fixed choice, one by one: no padding, and every hook is called."""

    model: PreTrainedModel
    plan: Plan

    def run(self, count: int) -> Iterator[None]:
        with _as_in_evaluation(self.model):
            for batch in self._batches(count):
                Network(self.model).hidden(batch)
                yield

    def run_back(self, count: int) -> Iterator[int]:
        task = TASKS[self.plan.recipe.task]
        with _as_in_evaluation(self.model):
            for batch in self._batches(count):
                with torch.enable_grad():
                    task.loss_sum(Network(self.model), batch).backward()
                yield batch.num_targets

    def _batches(self, count: int) -> Iterator[Batch]:
        examples = self.plan.dataset.train
        order = torch.randperm(len(examples), generator=stream(self.plan.recipe.training.seed, "beginning"))
        for index in order[:count].tolist():
            yield collate([examples[index]], self.plan.pad_id).to(next(self.model.parameters()).device)


@contextmanager
def _as_in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
