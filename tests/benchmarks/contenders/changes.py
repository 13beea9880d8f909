"""Ours with one thing changed: an idea left out, or one added. What each brings is measured beside ours itself.

A process is some percent faster or slower than the next, and so is a minute: a few percent more or less would be lost.
So both train in one process, each on a model of its own, and take the same step in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lora_cli.fusion.network import Network
from lora_cli.fusion.skipping import skipping
from lora_cli.fusion.states import MemoryStates
from lora_cli.ops.kernels import Kernels
from lora_cli.ops.low_rank import Projection, low_rank_linear
from lora_cli.ops.products import choose_products, products_as_before
from lora_cli.recipe import TrainingSection
from lora_cli.training.optimizer import FlatAdamW
from tests.benchmarks.contenders.job import Job
from tests.benchmarks.contenders.ours import examples, steps

PASSES = 3  # beside ours, the first of which is not counted


@dataclass(frozen=True)
class Changed:
    """``steps``' options; and what is so only while it takes a step."""

    options: dict[str, Any] = field(default_factory=dict)
    meanwhile: Callable[[], AbstractContextManager[Any]] = nullcontext
    alone: bool = False  # holds for a whole process: nothing can be beside it

    def __call__(self, job: Job) -> None:
        taken = steps(job, job.epochs, **self.options)
        for _ in range(job.epochs * job.shape.steps):
            with self.meanwhile():
                next(taken)
            job.tick()

    def beside_ours(self, job: Job) -> float:
        """How much longer it takes than ours: the seconds of all its steps over those of ours."""
        pair = [(self.meanwhile, steps(job, PASSES, **self.options)), (nullcontext, steps(job, PASSES))]
        took = [0.0, 0.0]
        for number in range(PASSES * job.shape.steps):
            for which in (0, 1) if number % 2 else (1, 0):
                meanwhile, taken = pair[which]
                with meanwhile():
                    seconds = _seconds_of_one(taken, job)
                took[which] += seconds if number >= job.shape.steps else 0
        return took[0] / took[1]


def _seconds_of_one(taken: Iterator[None], job: Job) -> float:
    began = time.perf_counter()
    next(taken)
    if job.on_cuda:
        torch.cuda.synchronize(job.device)
    return time.perf_counter() - began


def _laid_out(**changes: Any) -> Callable[[Network, Job], Network]:
    return lambda network, job: replace(network, layout=replace(network.layout, **changes))


@contextmanager
def _as_torch_multiplies() -> Iterator[None]:
    with products_as_before():
        choose_products((), torch.float32, torch.device("cpu"))
        yield


def _one_by_one(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    return tuple(output for one in projections for output in low_rank_linear(x, [one]))


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


def _through(network: Network, job: Job) -> Network:
    """As where a trainer makes the embeddings' output want a gradient, which recomputing asks of many."""
    embeddings = network.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled()))
    return network


def _cached(network: Network, job: Job) -> Network:
    return skipping(network, MemoryStates(), examples(job), job.shape.rows_per_step, 0)


nothing = Changed()  # a control: what is left of 1 is what the measurement cannot tell
compiled = Changed({"kernels": Kernels.COMPILED})
by_liger = Changed({"kernels": Kernels.LIGER})
padded = Changed({"attention": "sdpa"})
unfused = Changed({"fused": False})
whole = Changed({"change": _laid_out(looks_at=None)})
unshared = Changed({"change": _laid_out(share=0)})
all_logits = Changed({"change": lambda network, job: replace(network, head=None)})
apart = Changed(meanwhile=partial(patch, "lora_cli.fusion.forms.low_rank_linear", _one_by_one))
loose = Changed({"optimizer_type": LooseAdamW})
through = Changed({"change": _through})
cached = Changed({"change": _cached})
by_torch = Changed({"change": _laid_out(multiple=1)}, _as_torch_multiplies)  # which is in no need of fewer sizes
giving_back = Changed({"keep_freed": False}, alone=True)
