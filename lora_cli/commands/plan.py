"""Everything that can be known before the first step, without reading a weight.

`lora check` shows it, `lora train` begins with it. Rules that need rows or modules are checked here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from lora_cli.commands.caching import CachePlan, cache_notes, plan_cache
from lora_cli.commands.disk import backbone_bytes, disk_bytes
from lora_cli.commands.labels import choose_labels
from lora_cli.commands.rows import check_ids, check_words, encode, read_rows
from lora_cli.commands.trainable import ModelPlan, check_trainable, plan_model
from lora_cli.data.batches import StepPlan
from lora_cli.data.dataset import Dataset, label_counts
from lora_cli.device import available_bytes, choose_device, choose_dtype
from lora_cli.distributed import ALONE, World
from lora_cli.errors import Mistake, Problems, RecipeError, StorageError, UsageError
from lora_cli.hub import ModelFolder, weight_files
from lora_cli.models import add_tokens, load_config, load_tokenizer, num_embeddings, quiet, set_labels
from lora_cli.ops.packing import library
from lora_cli.recipe import LoadedRecipe, Recipe, TrainingSection, located
from lora_cli.recipe.rules.facts import is_quantized, was_changed
from lora_cli.recipe.schema import AUTO_ROWS
from lora_cli.storage import free_bytes
from lora_cli.training.metrics import check_trackers
from lora_cli.training.schedule import steps_in


@dataclass(frozen=True)
class Plan:
    """A recipe, understood down to the number of its steps."""

    loaded: LoadedRecipe
    model: ModelPlan
    tokenizer: PreTrainedTokenizerFast
    dataset: Dataset
    labels: list[str]
    steps: StepPlan
    total_steps: int
    warmup_steps: int
    device: torch.device
    dtype: torch.dtype
    disk_bytes: int
    notes: list[str] = field(default_factory=list)
    cache: CachePlan | None = None

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def is_sharded(self) -> bool:
        """Whether its processes hold the frozen layers in pieces."""
        return self.recipe.training.strategy == "fsdp" and self.steps.num_processes > 1

    @property
    def has_backbone(self) -> bool:
        """Whether the run trains on a base that it quantizes itself, when it begins, and keeps."""
        return self.recipe.lora.is_loftq

    @property
    def pad_id(self) -> int:
        """What fills the padding: positions tell padding from tokens, so any id of the vocabulary will do."""
        config_id = getattr(self.model.config, "pad_token_id", None)
        candidates = (self.tokenizer.pad_token_id, config_id, self.tokenizer.eos_token_id)
        embedded = num_embeddings(self.model.skeleton)
        return next((i for i in candidates if isinstance(i, int) and 0 <= i < embedded), 0)


def make_plan(loaded: LoadedRecipe, *, remote_code: bool = False, world: World = ALONE) -> Plan:
    """Read configuration, tokenizer and rows; find targets; count. Raises what is wrong with any of them."""
    with located(loaded), quiet():
        recipe, problems = loaded.recipe, Problems()
        # 1. what is not installed, not there or not readable
        with problems:
            check_trackers(recipe.training.report_to)
        with problems:
            check_quantization(recipe)
        with problems:
            config, folder = load_config(recipe.model, remote_code=remote_code)
        with problems:
            tokenizer = load_tokenizer(recipe.model, remote_code=remote_code)
            new_ids = add_tokens(tokenizer, recipe.dataset.new_tokens)
        with problems:
            readings = read_rows(recipe)
        problems.stop_if_any()
        # 2. the labels that shape a classifier's head, its modules and parameters, the rows' tokens
        labels = choose_labels(recipe, config, readings[0])
        if labels:
            set_labels(config, labels)
        with problems:
            model = plan_model(recipe, config, folder, new_ids, remote_code=remote_code)
            check_trainable(recipe, model)
        with problems:
            dataset = encode(recipe, tokenizer, labels, readings)
        problems.stop_if_any()
        # 3. whether they fit together
        check_ids(dataset, model.skeleton, loaded)
        check_words(recipe, model, len(tokenizer))
        # 4. the run's numbers
        device = choose_device(recipe.training.use_cpu)
        _check_auto(recipe, device)
        dtype = choose_dtype(recipe.model.dtype, device, trains_all=recipe.method == "full")
        cache = plan_cache(recipe, model.skeleton, [*dataset.train, *dataset.eval], dtype, device, world)
        steps, total, warmup = _schedule(recipe, len(dataset.train), world.size)
        plan = Plan(
            loaded,
            model,
            tokenizer,
            dataset,
            labels,
            steps,
            total,
            warmup,
            device,
            dtype,
            disk_bytes(model.counted, recipe, cache, backbone_bytes(model, recipe)),
            [
                *_weight_notes(folder),
                *_notes(loaded, config, dataset),
                *cache_notes(cache, steps.epoch_of(total), bool(dataset.eval)),
                *_process_notes(recipe, world.size),
            ],
            cache,
        )
        _check_disk(plan)
        return plan


def check_quantization(recipe: Recipe) -> None:
    """Raises ``UsageError`` where bitsandbytes is missing, ``RecipeError`` on a device that it does not serve."""
    if not is_quantized(recipe):
        return
    kind = recipe.model.quantization
    path, what = (("lora", "init_lora_weights"), "loftq") if kind == "none" else (("model", "quantization"), kind)
    device = choose_device(recipe.training.use_cpu)
    if device.type not in ("cpu", "cuda"):
        message = f"{what} works on CUDA and on the CPU, not on {device.type}"
        raise RecipeError([Mistake(path, message, "set training.use_cpu: true, or remove it")])
    library()


def _schedule(recipe: Recipe, num_rows: int, processes: int) -> tuple[StepPlan, int, int]:
    training = recipe.training
    if training.global_batch_size is not None and training.global_batch_size < processes:
        message = f"{training.global_batch_size} rows a step leave some of {processes} processes without any"
        raise RecipeError([Mistake(("training", "global_batch_size"), message, "use fewer processes")])
    micro, accumulation = split_of_step(training, processes)
    steps = StepPlan(
        num_rows,
        micro,
        accumulation,
        training.seed,
        recipe.dataset.shuffle,
        processes,
        training.global_batch_size,
    )
    total = training.max_steps or max(1, steps_in(float(training.num_train_epochs), steps.steps_per_epoch))
    warmup = steps_in(training.warmup_steps, total)
    if training.warmup_steps >= 1 and warmup >= total:
        message = f"{warmup} steps of warm-up do not fit into a run of {total} steps"
        raise RecipeError([Mistake(("training", "warmup_steps"), message)])
    return steps, total, min(warmup, total - 1)


def split_of_step(training: TrainingSection, processes: int = 1) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step) as the recipe has them.

    With ``auto`` the step is what it would be by default, and how it is cut is decided later: here, not at all.
    """
    if isinstance(training.per_device_train_batch_size, int):
        return training.per_device_train_batch_size, training.gradient_accumulation_steps
    if training.global_batch_size is not None:
        return -(-training.global_batch_size // processes), 1
    return AUTO_ROWS * training.gradient_accumulation_steps, 1


def _check_auto(recipe: Recipe, device: torch.device) -> None:
    """``auto`` needs a device that says how much memory it has left."""
    if recipe.training.per_device_train_batch_size == "auto" and available_bytes(device) is None:
        message = f"auto cannot be used on {device.type}, which does not say how much memory is free"
        raise RecipeError([Mistake(("training", "per_device_train_batch_size"), message, "write a number of rows")])


def _check_disk(plan: Plan) -> None:
    path = plan.recipe.output_path
    free = free_bytes(path)
    if plan.disk_bytes > free:
        needs, has = plan.disk_bytes / 1e6, free / 1e6
        raise StorageError(
            f"the run needs {needs:,.1f} MB in {path}, and {has:,.1f} MB are free",
            "free some space, or choose another output_dir",
        )


def _notes(loaded: LoadedRecipe, config: PreTrainedConfig, dataset: Dataset) -> list[str]:
    """What a person should know, though nothing is wrong."""
    notes = []
    training = loaded.recipe.training
    if training.max_steps and was_changed(training, "training", "num_train_epochs", loaded.source):
        notes.append("max_steps is set, so num_train_epochs is not used")
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(dataset.train_counts.longest, dataset.eval_counts.longest)
    if isinstance(limit, int) and longest > limit:
        notes.append(f"rows reach {longest} tokens; the model was trained on at most {limit}")
    if loaded.recipe.task == "sequence_classification":
        rows_of_class = label_counts(dataset.train, config.num_labels)
        empty = [str(config.id2label[index]) for index, rows in enumerate(rows_of_class) if not rows]
        notes += [f"no training row has the label {', '.join(empty)}"] if empty else []
    shared = {example.where for example in dataset.train} & {example.where for example in dataset.eval}
    if shared:
        notes.append(f"{len(shared)} evaluation rows are training rows too: their figures say little")
    if not dataset.eval:
        notes.append("no evaluation rows: set dataset.eval_size to see what the training brings")
        idle = [
            key
            for key in ("eval_steps", "per_device_eval_batch_size")
            if was_changed(training, "training", key, loaded.source)
        ]
        notes += [f"training.{key} has no effect without evaluation rows" for key in idle]
    return notes


def _weight_notes(folder: ModelFolder | None) -> list[str]:
    """A plan needs no weights, and training does. Those of the hub are not here yet."""
    if folder is None or folder.commit is not None:
        return []
    try:
        weight_files(folder.path)
    except UsageError as error:
        return [f"this can be planned and not be trained: {error.message}"]
    return []


def _process_notes(recipe: Recipe, processes: int) -> list[str]:
    if recipe.training.strategy == "fsdp" and processes == 1:
        return ["training.strategy: fsdp shards nothing in a single process"]
    return []
