"""A run: what happens between two steps. Evaluate, keep the best, save, stop early, stop when asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from lora_cli.adapters.patterns import ending
from lora_cli.data.batches import StepPlan
from lora_cli.data.encoding import Example
from lora_cli.device import peak_memory_bytes
from lora_cli.distributed import ALONE, World
from lora_cli.errors import NonFiniteError, Stopped, UsageError
from lora_cli.fusion.network import Network
from lora_cli.recipe import TrainingSection
from lora_cli.tasks import Metrics, Task
from lora_cli.training.checkpoint import Best, Checkpoints, State, gathered_rng
from lora_cli.training.evaluation import evaluate, evaluation_size
from lora_cli.training.loop import LoopSettings, Step, train_steps
from lora_cli.training.metrics import Line, MetricsFile, Tracker
from lora_cli.training.optimizer import FlatAdamW, trained_parameters
from lora_cli.training.schedule import is_due
from lora_cli.training.signals import StopRequest


def check_gradients(optimizer: FlatAdamW, world: World = ALONE) -> None:
    """Raises ``UsageError`` for adapters that a step went past: they would be saved, and mean nothing.

    Some models multiply by a layer's weight themselves instead of calling the layer. An expert to which no
    token was sent is another matter.
    """
    optimizer.stop_watching()
    missed = set.intersection(*map(set, world.gather(sorted(optimizer.never_reached))))  # one may have had no rows
    factors = (".lora_B", ".lora_embedding_B")
    idle = [name.rpartition(".")[0] for name in sorted(missed) if name.endswith(factors) and "expert" not in name]
    if idle:
        kinds = sorted({ending(name) for name in idle})
        raise world.shared(
            UsageError(
                f"{len(idle)} adapters get no gradient, because this model uses their weights without calling the "
                f"layers: {', '.join(idle[:3])}{' and more' if len(idle) > 3 else ''}",
                f"set lora.exclude_modules: [{', '.join(kinds)}]",
            )
        )


class Observer(Protocol):
    """Who watches a run; the screen is one."""

    def step(self, step: Step, state: State) -> None: ...

    def line(self, line: Line) -> None: ...

    def evaluation_begins(self, rows: int) -> None: ...

    def evaluation_advances(self, rows: int) -> None: ...

    def evaluation_ends(self, step: int, metrics: Metrics | None) -> None: ...

    def saved(self, step: int) -> None: ...


@dataclass
class Run:
    """One training run in progress. ``state`` says where it stands."""

    network: Network
    task: type[Task]
    train: list[Example]
    eval: list[Example]
    plan: StepPlan
    training: TrainingSection
    settings: LoopSettings
    optimizer: FlatAdamW
    checkpoints: Checkpoints
    metrics: MetricsFile
    trackers: list[Tracker]
    adapter_config: dict[str, Any] | None
    state: State
    observer: Observer
    stop: StopRequest
    device: torch.device
    world: World = ALONE

    def execute(self) -> None:
        """Run to the end. Raises ``Stopped`` after a signal, with the state saved."""
        self.network.model.train()
        self._agree_on_stop()
        self._between_steps()
        first = self.state.step + 1
        for step in self._steps():
            if step.number == first:
                check_gradients(self.optimizer, self.world)
            self._record(step)
            self._between_steps()

    @property
    def finished(self) -> bool:
        return self.state.step == self.settings.total_steps or self.state.stopped_early

    def _steps(self) -> Iterator[Step]:
        steps = train_steps(
            self.network,
            self.task,
            self.train,
            self.plan,
            self.optimizer,
            self.settings,
            start=self.state.step,
            device=self.device,
            world=self.world,
            stop=self.stop,
        )
        while not self.finished:
            yield next(steps)

    def _between_steps(self) -> None:
        improved = self._evaluate() if self._evaluation_due() else False
        if improved or self.stop or (self.state.step > 0 and self._due(self.training.save_steps)) or self.finished:
            self._save()
        if self.stop.signum is not None and not (self.finished and self._evaluated()):
            name = Stopped(self.stop.signum, "").signal_name
            raise self.world.shared(
                Stopped(
                    self.stop.signum,
                    f"stopped by {name} after step {self.state.step} of {self.settings.total_steps}; "
                    "everything is saved",
                    "type the same command again to go on",
                )
            )

    def _agree_on_stop(self) -> None:
        """Outside of steps, where no sum is under way that could carry the votes."""
        if self.world.size > 1:
            self.stop.count(self.world.add(torch.tensor(self.stop.votes)).tolist())

    def _due(self, cadence: int | float | str) -> bool:
        return is_due(cadence, self.state.step, self.settings.total_steps, self.plan.steps_per_epoch)

    def _evaluated(self) -> bool:
        return not self.eval or self.state.evaluated_step == self.state.step

    def _evaluation_due(self) -> bool:
        return not self._evaluated() and (self.state.step == 0 or self._due(self.training.eval_steps))

    def _record(self, step: Step) -> None:
        state = self.state
        state.step = step.number
        state.tokens += step.num_tokens
        state.seconds += step.seconds
        for name, value in [
            ("loss", step.loss * step.num_targets),
            ("targets", step.num_targets),
            ("tokens", step.num_tokens),
            ("seconds", step.seconds),
        ]:
            state.window[name] = state.window.get(name, 0.0) + value
        self.observer.step(step, state)
        if (
            step.number == 1
            or step.number == self.settings.total_steps
            or step.number % self.training.logging_steps == 0
        ):
            self._log(step)

    def _log(self, step: Step) -> None:
        window, self.state.window = self.state.window, {}
        line = {
            "step": step.number,
            "epoch": self.plan.epoch_of(step.number),
            "loss": window["loss"] / window["targets"],
            "learning_rate": step.learning_rate,
            "grad_norm": step.grad_norm,
            "tokens": self.state.tokens,
            "tokens_per_second": window["tokens"] / window["seconds"],
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        self._write(line)
        self.observer.line(line)

    def _write(self, line: Line) -> None:
        self.metrics.write(line)
        for tracker in self.trackers:
            tracker.log(line["step"], {key: value for key, value in line.items() if key != "step"})

    def _evaluate(self) -> bool:
        """Evaluate, and tell whether the adapter is the best so far."""
        self.observer.evaluation_begins(len(self.eval))
        size, tokens = self._evaluation_size
        metrics = evaluate(
            self.network,
            self.task,
            self.eval,
            batch_size=size,
            max_tokens=tokens,
            pad_id=self.settings.pad_id,
            device=self.device,
            world=self.world,
            stop=lambda: self.stop.noted is not None,
            progress=self.observer.evaluation_advances,
        )
        self._agree_on_stop()
        self.observer.evaluation_ends(self.state.step, metrics)
        if metrics is None:  # cut short by a signal; done again on resuming
            return False
        if not math.isfinite(metrics["loss"]):
            raise self.world.shared(
                NonFiniteError(
                    f"the evaluation loss after step {self.state.step} is not finite",
                    "lower training.learning_rate, or use model.dtype: float32",
                )
            )
        state = self.state
        state.evaluated_step = state.step
        self._write(
            {"step": state.step, "epoch": self.plan.epoch_of(state.step)}
            | {f"eval_{name}": value for name, value in metrics.items()}
        )
        if state.step == 0:
            state.before = metrics
            return False
        return self._note_best(metrics)

    @cached_property
    def _evaluation_size(self) -> tuple[int, int | None]:
        asked, layout = self.training.per_device_eval_batch_size, self.network.layout
        return evaluation_size(asked, self.plan, self.train, self.settings.total_steps, layout)

    def _note_best(self, metrics: Metrics) -> bool:
        state, name = self.state, self.training.metric_for_best_model.removeprefix("eval_")
        value, best = metrics[name], state.best
        higher = name in self.task.higher_is_better
        if best is None or (value > best.value if higher else value < best.value):
            state.best = Best(state.step, value, metrics)
            state.evaluations_without_improvement = 0
            return True
        state.evaluations_without_improvement += 1
        patience = self.training.early_stopping_patience
        early = state.step < self.settings.total_steps
        state.stopped_early = early and patience is not None and state.evaluations_without_improvement >= patience
        return False

    def _save(self) -> None:
        self._check_weights()
        rng = gathered_rng(self.world)
        with self.world.together():
            if self.world.is_main:
                self.state.metrics_bytes = self.metrics.size
                self.checkpoints.save(self.network.model, self.optimizer, self.state, self.adapter_config, rng)
        self.observer.saved(self.state.step)

    def _check_weights(self) -> None:
        """An update can overflow where its gradient did not; such weights must not push out the last good ones."""
        for name, parameter in trained_parameters(self.network.model).items():
            if not torch.isfinite(parameter).all():
                raise self.world.shared(
                    NonFiniteError(
                        f"the weights after step {self.state.step} are not finite ({name}); they were not saved",
                        "lower training.learning_rate, or use model.dtype: float32",
                    )
                )
