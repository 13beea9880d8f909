"""`lora train`: from a recipe to an adapter, going on where an earlier run stopped."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from lora_cli.adapters.backbone import read_report
from lora_cli.adapters.files import load_trained
from lora_cli.commands.autosize import Choice, agreed, is_auto, planned, prove
from lora_cli.commands.base import base_folder, known_base
from lora_cli.commands.building import LOADING_CURE, build_model, choose_network
from lora_cli.commands.caching import cached
from lora_cli.commands.identity import check_same_run, identity
from lora_cli.commands.memory import MemoryPlanner
from lora_cli.commands.output import OutputFolder, adapter_config, save_result
from lora_cli.commands.plan import Plan, make_plan
from lora_cli.commands.provenance import read_provenance
from lora_cli.commands.summary import Summary, summarise
from lora_cli.device import memory_errors, peak_memory_bytes, prepare_for_training
from lora_cli.distributed import ALONE, World
from lora_cli.errors import Mistake, RecipeError
from lora_cli.fusion.multiplying import products_for
from lora_cli.fusion.network import Network
from lora_cli.hub import weight_files
from lora_cli.models import fingerprint
from lora_cli.recipe import LoadedRecipe, Recipe, located
from lora_cli.seeds import stream_seed
from lora_cli.storage import hold_folder, is_intact
from lora_cli.tasks import TASKS
from lora_cli.training.checkpoint import Checkpoints, State, read_trained, restore, state_of
from lora_cli.training.loop import LoopSettings
from lora_cli.training.metrics import MetricsFile, NoMetrics, build_trackers
from lora_cli.training.optimizer import FlatAdamW
from lora_cli.training.run import Observer, Run
from lora_cli.training.signals import StopRequest


class TrainObserver(Observer, Protocol):
    """A run's observer that is also told of its beginning."""

    def begins(self, plan: Plan, output: OutputFolder, state: State, set_aside: Path | None) -> None: ...

    def quantized(self, done: int, total: int) -> None: ...

    def network(self, network: Network) -> None: ...

    def micro_batch(self, choice: Choice) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a finished `lora train` has to show."""

    plan: Plan
    output: OutputFolder
    summary: Summary
    lines: list[dict[str, Any]]  # of metrics.jsonl
    already_finished: bool = False


@dataclass(frozen=True)
class Standing:
    """Where a run stands when a session begins, in the eyes of all its processes."""

    state: State
    checkpoint: Path | None  # known to the main process: it reads for all
    identity: dict[str, Any]
    base: Path  # the folder of the weights that it trains on
    set_aside: Path | None = None
    summary: Summary | None = None  # of a run that is finished

    def named(self, plan: Plan) -> str:
        """The base as the adapter names it: as the recipe does, or the folder that this run made."""
        made = plan.model.folder is None or plan.has_backbone
        return os.fspath(self.base) if made else plan.recipe.model.path or ""


def train(
    loaded: LoadedRecipe,
    observer: TrainObserver,
    *,
    fresh: bool = False,
    remote_code: bool = False,
    world: World = ALONE,
) -> Outcome | None:
    """Train as the recipe says. Raises any ``LoraError``; ``Stopped`` after a signal.

    Of several processes, all do the same work on rows of their own; the main one alone writes files, and has
    an outcome to show.
    """
    output = OutputFolder(loaded.recipe.output_path, loaded.recipe.method)
    with located(loaded), ExitStack() as held:
        # 1. everything that can be wrong before a weight is read
        with world.together():
            world.take_device(loaded.recipe.training.use_cpu)
            check_places(loaded, output, world, fresh=fresh)
            if world.is_main:
                held.enter_context(hold_folder(output.root))
        with world.together():
            plan = make_plan(loaded, remote_code=remote_code, world=world)
        # 2. is this the beginning, the continuation or the end of a run?
        checkpoints = Checkpoints(output.checkpoints, plan.recipe.training.save_total_limit)
        standing = find_standing(plan, output, checkpoints, observer, world, fresh=fresh, remote_code=remote_code)
        observer.begins(plan, output, standing.state, standing.set_aside)
        if world.tell(standing.summary is not None):
            return finished_outcome(plan, output, standing) if world.is_main else None
        prepare_for_training()
        held.enter_context(products_for(plan.model.skeleton, plan.device, plan.dtype))
        # 3. the model, and the weights of the checkpoint
        shared = {"sharing": world.local_size, "running": world.local_size}
        planner = MemoryPlanner(plan, remote_code=remote_code, **shared) if is_auto(plan) else None
        sizes = planned(planner, standing.state.micro_batch_size) if planner else []
        model = build_model(plan, standing.base, standing.checkpoint, remote_code=remote_code, world=world)
        plan = replace(plan, model=plan.model.with_trained(model))
        network = choose_network(model, plan, world)
        with world.together(), memory_errors(LOADING_CURE):
            rows = [*plan.dataset.train, *plan.dataset.eval]
            network = cached(network, plan.recipe, rows, plan.pad_id, output.root)
            optimizer = FlatAdamW(model, plan.recipe.training)
        observer.network(network)
        seed_dropout(plan, standing.state, world)
        if world.tell(standing.checkpoint is not None):
            restore(standing.checkpoint or Path(), model, optimizer, world)
        if sizes:
            with world.together():
                choice = prove(plan, network, optimizer, sizes)
            choice = agreed(choice, world)
            plan = replace(plan, steps=choice.steps)
            standing.state.micro_batch_size = choice.steps.micro_batch_size
            observer.micro_batch(choice)
        # 4. train
        config = adapter_config(plan, model, base=standing.named(plan))
        with world.together():
            run = build_run(plan, output, network, optimizer, checkpoints, standing.state, config, observer, world)
        with run.stop:
            try:
                run.execute()
            finally:
                for tracker in run.trackers:
                    tracker.close()
        # 5. the best adapter, and the figures
        peaks = world.gather(peak_memory_bytes(plan.device))
        with world.together():
            return deliver(plan, output, run, standing, peaks) if world.is_main else None


def check_places(loaded: LoadedRecipe, output: OutputFolder, world: World, *, fresh: bool) -> None:
    """Refuse an output folder or a model's folder that cannot be used, before the rows are read."""
    if world.is_main:
        output.check_usable()
    if fresh:
        check_not_set_aside(loaded.recipe, output)
    name = loaded.recipe.model.path
    if name is not None and os.path.isdir(name):
        weight_files(Path(name))


def check_not_set_aside(recipe: Recipe, output: OutputFolder) -> None:
    """Refuse to move away what the run is to begin from."""
    needed = {
        ("lora", "init_from"): recipe.lora.init_from,
        ("model", "path"): recipe.model.path,
        ("model", "tokenizer"): recipe.model.tokenizer,
    }
    inside = [
        path
        for path, name in needed.items()
        if name is not None and Path(name).expanduser().resolve().is_relative_to(output.root.resolve())
    ]
    if inside:
        message = "lies in output_dir, which --fresh sets aside"
        raise RecipeError([Mistake(path, message, "choose another output_dir") for path in inside])


def find_standing(
    plan: Plan,
    output: OutputFolder,
    checkpoints: Checkpoints,
    observer: TrainObserver,
    world: World,
    *,
    fresh: bool,
    remote_code: bool = False,
) -> Standing:
    """The main process looks into the output folder, and the others are told."""
    set_aside, found, state = None, None, State()
    with world.together():
        if world.is_main:
            set_aside = output.set_aside() if fresh else None
            found = checkpoints.newest()
            if found is None:
                output.write_recipe(plan)  # before anything else is in the folder: it says whose it is
            else:
                check_same_run(found[1].run, identity(plan, found[1].run["base"]))  # but for the base itself
            base = base_folder(
                plan, output, made_before=found is not None, tell=observer.quantized, remote_code=remote_code
            )
    with world.together():
        if not world.is_main:
            base = known_base(plan, output)
        now = identity(plan, fingerprint(base))
        check_origin(plan, now["base"])
    world.check_same(now)
    summary = None
    with world.together():
        if world.is_main:
            state = found[1] if found else State(run=now)
            check_same_run(state.run, now)
            output.write_recipe(plan)
            summary = output.read_summary() if is_finished(plan, state) and is_intact(output.result) else None
    if world.size > 1:
        state = state_of(world.tell(asdict(state)))
    return Standing(state, found[0] if found else None, now, base, set_aside, summary)


def check_origin(plan: Plan, base_fingerprint: str) -> None:
    """Refuse to go on from an adapter that is known to belong to other weights."""
    if plan.recipe.lora.init_from is None:
        return
    recorded = read_provenance(Path(plan.recipe.lora.init_from).expanduser()).base_fingerprint
    if recorded is not None and recorded != base_fingerprint:
        message = "was trained on other weights than those in model.path"
        raise RecipeError([Mistake(("lora", "init_from"), message, "name its own base in model.path")])


def finished_outcome(plan: Plan, output: OutputFolder, standing: Standing) -> Outcome:
    assert standing.summary is not None
    metrics = MetricsFile(output.metrics, standing.state.metrics_bytes)
    return Outcome(plan, output, standing.summary, metrics.read(), already_finished=True)


def seed_dropout(plan: Plan, state: State, world: World) -> None:
    """Every process drops other units.

    A checkpoint of as many processes holds where their streams stand, and ``restore`` puts that back; where the
    number of processes has changed, the streams begin anew, named by step and rank.
    """
    names: list[str | int] = ["dropout"]
    names += ["from", state.step] if state.step else []
    names += [world.rank] if world.rank else []
    torch.manual_seed(stream_seed(plan.recipe.training.seed, *names))


def deliver(plan: Plan, output: OutputFolder, run: Run, standing: Standing, peaks: list[int]) -> Outcome:
    """Put the best adapter into the output folder, with the run's figures."""
    state, model = run.state, run.network.model
    if state.best is not None and state.best.step != state.step:
        load_trained(model, read_trained(run.checkpoints.intact(state.best.step)))
    lines = run.metrics.read()
    summary = summarise(plan, output.result, state, lines, peaks, read_report(standing.base))
    save_result(output, plan, model, run.adapter_config, summary, standing.identity["base"])
    return Outcome(plan, output, summary, lines)


def is_finished(plan: Plan, state: State) -> bool:
    evaluated = not plan.dataset.eval or state.evaluated_step == state.step
    return (state.step == plan.total_steps or state.stopped_early) and evaluated


def build_run(
    plan: Plan,
    output: OutputFolder,
    network: Network,
    optimizer: FlatAdamW,
    checkpoints: Checkpoints,
    state: State,
    config: dict[str, Any] | None,
    observer: Observer,
    world: World = ALONE,
) -> Run:
    """A run ready to execute, its numbers resolved from the recipe and the plan."""
    training = plan.recipe.training
    trackers = training.report_to if world.is_main else []
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
        metrics=MetricsFile(output.metrics, state.metrics_bytes) if world.is_main else NoMetrics(output.metrics),
        trackers=build_trackers(trackers, output.root, plan.recipe.model_dump(mode="json"), state.step),
        adapter_config=config,
        state=state,
        observer=observer,
        stop=StopRequest(world),
        device=plan.device,
        world=world,
    )
