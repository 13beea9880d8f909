"""`lora train`: from a recipe to an adapter, going on where an earlier run stopped."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_cli.adapters.files import load_trained
from lora_cli.adapters.initialisation import initialise
from lora_cli.adapters.injection import adapters_of
from lora_cli.commands.autosize import Choice, is_auto, planned, prove
from lora_cli.commands.identity import check_same_run, identity
from lora_cli.commands.memory import MemoryPlanner
from lora_cli.commands.output import OutputFolder, adapter_config, save_result
from lora_cli.commands.plan import Plan, located, make_plan
from lora_cli.commands.summary import Summary, summarise
from lora_cli.commands.trainable import prepare
from lora_cli.device import keep_freed_memory, memory_errors
from lora_cli.errors import UsageError
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_network
from lora_cli.hub import model_folder, weight_files
from lora_cli.models import checkpoint_activations, fingerprint, head_modules, load_model, quiet, random_model
from lora_cli.recipe import LoadedRecipe
from lora_cli.seeds import stream_seed
from lora_cli.storage import hold_folder, is_intact, new_folder
from lora_cli.tasks import TASKS
from lora_cli.training.checkpoint import Checkpoints, State, read_trained, restore
from lora_cli.training.loop import LoopSettings
from lora_cli.training.metrics import MetricsFile, build_trackers
from lora_cli.training.optimizer import FlatAdamW
from lora_cli.training.run import Observer, Run
from lora_cli.training.signals import StopRequest

LOADING_CURE = "use a smaller model, or model.dtype: bfloat16"


class TrainObserver(Observer, Protocol):
    """A run's observer that is also told of its beginning."""

    def begins(self, plan: Plan, output: OutputFolder, state: State, set_aside: Path | None) -> None: ...

    def micro_batch(self, choice: Choice) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a finished `lora train` has to show."""

    plan: Plan
    output: OutputFolder
    summary: Summary
    lines: list[dict[str, Any]]  # of metrics.jsonl
    already_finished: bool = False


def train(loaded: LoadedRecipe, observer: TrainObserver, *, fresh: bool = False, remote_code: bool = False) -> Outcome:
    """Train as the recipe says. Raises any ``LoraError``; ``Stopped`` after a signal."""
    # 1. everything that can be wrong before a weight is read
    output = OutputFolder(loaded.recipe.output_path, loaded.recipe.method)
    output.check_usable()
    name = loaded.recipe.model.path
    if name is not None and os.path.isdir(name):
        weight_files(Path(name))
    with located(loaded), hold_folder(output.root):
        plan = make_plan(loaded, remote_code=remote_code)
        # 2. is this the beginning, the continuation or the end of a run?
        set_aside = output.set_aside() if fresh else None
        checkpoints = Checkpoints(output.checkpoints, plan.recipe.training.save_total_limit)
        found = checkpoints.newest()
        if found is None:
            output.write_recipe(plan)  # before anything else is in the folder: it says whose it is
        base = base_folder(plan, output, made_before=found is not None)
        now = identity(plan, fingerprint(base))
        state = found[1] if found else State(run=now)
        check_same_run(state.run, now)
        output.write_recipe(plan)
        observer.begins(plan, output, state, set_aside)
        summary = output.read_summary()
        if is_finished(plan, state) and summary is not None and is_intact(output.result):
            metrics = MetricsFile(output.metrics, state.metrics_bytes)
            return Outcome(plan, output, summary, metrics.read(), already_finished=True)
        keep_freed_memory()
        # 3. the model, and the weights of the checkpoint
        cuts = planned(MemoryPlanner(plan, remote_code=remote_code), state.micro_batch_size) if is_auto(plan) else []
        with memory_errors(LOADING_CURE):
            model = build_model(plan, base, remote_code=remote_code)
            network = build_network(model, plan.recipe.task, attention=plan.recipe.model.attn_implementation)
            optimizer = FlatAdamW(model, plan.recipe.training)
        torch.manual_seed(stream_seed(plan.recipe.training.seed, "dropout"))
        if found:
            restore(found[0], model, optimizer)
        if cuts:
            choice = prove(plan, network, optimizer, cuts)
            plan = replace(plan, steps=choice.steps)
            state.micro_batch_size = choice.steps.micro_batch_size
            observer.micro_batch(choice)
        # 4. train
        config = adapter_config(
            plan, model, base=str(base) if plan.model.folder is None else plan.recipe.model.path or ""
        )
        run = build_run(plan, output, network, optimizer, checkpoints, state, config, observer)
        with run.stop:
            try:
                run.execute()
            finally:
                for tracker in run.trackers:
                    tracker.close()
        # 5. the best adapter, and the figures
        if state.best is not None and state.best.step != state.step:
            load_trained(model, read_trained(checkpoints.intact(state.best.step)))
        lines = run.metrics.read()
        summary = summarise(plan, output.result, state, lines)
        save_result(output, plan, model, config, summary, now["base"])
        return Outcome(plan, output, summary, lines)


def is_finished(plan: Plan, state: State) -> bool:
    evaluated = not plan.dataset.eval or state.evaluated_step == state.step
    return (state.step == plan.total_steps or state.stopped_early) and evaluated


def base_folder(plan: Plan, output: OutputFolder, *, made_before: bool) -> Path:
    """The folder of the base's weights. A random base is made when a run begins, and kept with it."""
    recipe = plan.recipe
    if plan.model.folder is not None:
        assert recipe.model.path is not None
        return model_folder(recipe.model.path, recipe.model.revision).path
    if not (made_before and is_intact(output.base)):  # without a checkpoint, it may be another recipe's
        # float32 as drawn: what is rounded is the run's choice, not the file's
        model = random_model(plan.model.config, recipe.task, torch.float32, recipe.training.seed)
        with new_folder(output.base, replace=True) as folder, quiet():
            model.save_pretrained(folder)
    return output.base


def build_model(plan: Plan, base: Path, *, remote_code: bool = False) -> PreTrainedModel:
    """The base with its weights, adapters attached and initialised, on the device, ready to train."""
    recipe = plan.recipe
    torch.manual_seed(stream_seed(recipe.training.seed, "head"))  # transformers draws what the files do not hold
    model, missing = load_model(
        base,
        plan.model.config,
        recipe.task,
        plan.dtype,
        attn_implementation=recipe.model.attn_implementation,
        remote_code=remote_code,
    )
    _check_missing(missing, plan, base)
    prepare(model, recipe)
    initialise(adapters_of(model), recipe.lora.init_lora_weights, recipe.training.seed)
    model.to(plan.device)
    if recipe.training.gradient_checkpointing:
        checkpoint_activations(model)
    if recipe.training.torch_compile:
        compile_layers(model)
    return model


def _check_missing(missing: list[str], plan: Plan, base: Path) -> None:
    """Parameters that the files lack are random: fine in a part that is trained, ruinous in a frozen one."""
    allowed = [*head_modules(plan.model.skeleton, plan.recipe.task), *plan.model.saved]
    frozen = [name for name in missing if not any(name.startswith(f"{module}.") for module in allowed)]
    if frozen:
        modules = sorted({name.rsplit(".", 1)[0] for name in frozen})
        cure = f"set lora.modules_to_save: [{', '.join(modules[:4])}]" if plan.recipe.method != "full" else "use lora"
        raise UsageError(
            f"the weights in {base} lack {', '.join(frozen[:4])}{' and more' if len(frozen) > 4 else ''}: "
            "they would be random",
            f"is this the right model? To train them from scratch, {cure}",
        )


def compile_layers(model: nn.Module) -> None:
    """Compile layer by layer: one compilation serves all layers, and a classifier's own pooling is unaffected."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in layers or [model]:
        module.compile(dynamic=True)


def build_run(
    plan: Plan,
    output: OutputFolder,
    network: Network,
    optimizer: FlatAdamW,
    checkpoints: Checkpoints,
    state: State,
    config: dict[str, Any] | None,
    observer: Observer,
) -> Run:
    """A run ready to execute, its numbers resolved from the recipe and the plan."""
    training = plan.recipe.training
    return Run(
        network=network,
        task=TASKS[plan.recipe.task],
        train=plan.dataset.train,
        eval=plan.dataset.eval,
        plan=plan.steps,
        training=training,
        settings=LoopSettings(
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.lr_scheduler_type,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.total_steps,
            max_grad_norm=training.max_grad_norm,
            pad_id=plan.pad_id,
        ),
        optimizer=optimizer,
        checkpoints=checkpoints,
        metrics=MetricsFile(output.metrics, state.metrics_bytes),
        trackers=build_trackers(training.report_to, output.root, plan.recipe.model_dump(mode="json"), state.step),
        adapter_config=config,
        state=state,
        observer=observer,
        stop=StopRequest(),
        device=plan.device,
    )
