"""A training step on the meta device: every tensor it would make is weighed, and none is made.

The step's own code runs, so the figures follow it by themselves: what each autograd node saves, what lives for
a moment only, and the moment when most is alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_cli.adapters.layer import LINEAR_TYPES, features
from lora_cli.data.batches import Batch
from lora_cli.fusion.network import Network
from lora_cli.fusion.outline import on_paper
from lora_cli.tasks import Task
from lora_cli.training.loop import accumulate_gradients


class LiveBytes(TorchDispatchMode):
    """Follows the memory behind tensors of one kind of device, from the operation that makes it until it is freed."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if self._counts(t)}
        for leaf in tree_leaves(output):
            if self._counts(leaf) and id(leaf.untyped_storage()) not in before:  # not a view, nor in place
                self._note(leaf.untyped_storage())
        return output

    def _counts(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.device.type == self.device_type

    def _note(self, storage: torch.UntypedStorage) -> None:
        number, size = id(storage), storage.nbytes()
        if number in self._known:
            return
        self._known[number] = weakref.ref(storage, lambda _: self._forget(number, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, number: int, size: int) -> None:
        del self._known[number]
        self.live -= size


@dataclass(frozen=True)
class StepBytes:
    """What a micro-batch adds to what lives all the time."""

    kept: int  # when the loss is known and the backward pass begins
    forward: int  # the most at one time on the way there
    peak: int  # the most of the whole step


def rehearse_step(network: Network, task: type[Task], batch: Batch, device: torch.device) -> StepBytes:
    """One micro-batch through the loop's own code. Model and batch are on the meta device."""
    parameters = [p for p in network.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    seen: list[tuple[int, int]] = []
    with on_paper(device), LiveBytes("meta") as memory:
        accumulate_gradients(network, _Paused(task, lambda: seen.append((memory.live, memory.peak))), [batch], _META)  # type: ignore[arg-type]
    (kept, forward), *_ = seen
    return StepBytes(kept, forward, memory.peak)


def guess_step(
    model: PreTrainedModel, tokens: int, probabilities: int, itemsize: int, checkpointing: bool
) -> StepBytes:
    """For models whose code asks for values, and so cannot be rehearsed: what layers of their sizes keep.

    Every linear layer is taken to keep its input and its output, every norm its input in float32 too, attention so many
    ``probabilities`` a layer; of experts, those that a token is sent to. Checkpointing keeps a layer's input, and one
    layer at a time as a whole.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    sizes = [sum(features(m)) for m in model.modules() if isinstance(m, LINEAR_TYPES)]
    output = model.get_output_embeddings()
    sizes += [-sum(features(output))] if isinstance(output, LINEAR_TYPES) else []
    chosen = int(getattr(model.config, "num_experts_per_tok", None) or 1)
    sizes += [chosen * (p.shape[1] + p.shape[2]) for p in model.parameters() if p.ndim == 3]
    norms = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 1 and "norm" in name.lower())
    kept = tokens * (itemsize * sum(sizes) + (itemsize + 4) * norms) + probabilities * itemsize * len(layers)
    one_layer = kept // max(1, len(layers))
    if checkpointing and layers:
        hidden = int(getattr(model.config, "hidden_size", 0) or 0)
        kept = tokens * itemsize * hidden * len(layers)
    return StepBytes(kept, kept + one_layer, kept + one_layer)


@torch.no_grad()
def rehearse_evaluation(network: Network, task: type[Task], batch: Batch, device: torch.device) -> int:
    """The most at one time in an evaluation's batch."""
    was_training = network.model.training
    network.model.eval()
    try:
        with on_paper(device), LiveBytes("meta") as memory:
            task.loss_sum(network, batch)
    finally:
        network.model.train(was_training)
    return memory.peak


_META = torch.device("meta")


class _Paused:
    """A task that tells when the loss is there."""

    def __init__(self, task: type[Task], then: Callable[[], None]) -> None:
        self.task, self.then = task, then

    def loss_sum(self, network: Network, batch: Batch) -> Tensor:
        loss = self.task.loss_sum(network, batch)
        self.then()
        return loss
