"""Everything that can be known before the first step, without reading a weight.

`lora check` shows it, `lora train` begins with it. Rules that need rows or modules are checked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from lora_cli.adapters.injection import Target, attach, find_saved, find_targets, freeze_base
from lora_cli.data.batches import StepPlan
from lora_cli.data.dataset import Dataset, Reading, build_dataset, labels_of, read_eval, read_train
from lora_cli.data.encoding import Example, LabelEncoder, TextEncoder
from lora_cli.data.formats import Content
from lora_cli.device import choose_device, choose_dtype
from lora_cli.errors import DataError, Mistake, RecipeError, StorageError, UsageError
from lora_cli.hub import ModelFolder
from lora_cli.models import empty_model, head_modules, load_config, load_tokenizer, set_labels
from lora_cli.recipe import LoadedRecipe, Recipe
from lora_cli.storage import free_bytes
from lora_cli.training.metrics import check_trackers
from lora_cli.training.schedule import steps_in


@dataclass(frozen=True)
class Counted:
    """Parameters of the whole model, and those that are trained."""

    total: int
    trainable: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


@dataclass(frozen=True)
class ModelPlan:
    """The model as it will be: its modules on the meta device, with adapters where they will be."""

    config: PreTrainedConfig
    folder: ModelFolder | None  # none for a random model
    skeleton: PreTrainedModel
    targets: list[Target]
    saved: list[str]  # modules trained in full
    counted: Counted


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

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def pad_id(self) -> int:
        """What fills the padding: positions tell padding from tokens, so any id of the vocabulary will do."""
        candidates = (self.tokenizer.pad_token_id, self.model.config.pad_token_id, self.tokenizer.eos_token_id)
        return next((i for i in candidates if isinstance(i, int) and i >= 0), 0)


@contextmanager
def located(loaded: LoadedRecipe) -> Iterator[None]:
    """Give recipe mistakes that were found late the place where the key stands."""
    try:
        yield
    except RecipeError as error:
        error.source = error.source or loaded.source
        raise


def make_plan(loaded: LoadedRecipe, *, remote_code: bool = False) -> Plan:
    """Read configuration, tokenizer and rows; find targets; count. Raises what is wrong with any of them."""
    with located(loaded):
        recipe = loaded.recipe
        # 1. cheap refusals first: what is not installed, not writable, not there
        check_trackers(recipe.training.report_to)
        config, folder = load_config(recipe.model, remote_code=remote_code)
        tokenizer = load_tokenizer(recipe.model, remote_code=remote_code)
        # 2. rows, and with them the labels that shape a classifier's head
        readings = _read_rows(recipe)
        labels = _labels(recipe, config, readings[0]) if recipe.task == "sequence_classification" else []
        if labels:
            set_labels(config, labels)
        # 3. modules and parameters, before the slow part of the rows: tokens
        model = plan_model(recipe, config, folder, remote_code=remote_code)
        dataset = _encode(recipe, tokenizer, labels, readings)
        _check_ids(dataset, model.skeleton, loaded)
        # 4. the run's numbers
        device = choose_device(recipe.training.use_cpu)
        steps, total, warmup = _schedule(recipe, len(dataset.train))
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
            choose_dtype(recipe.model.dtype, device, trains_all=recipe.method == "full"),
            disk_bytes(model.counted, recipe),
            _notes(recipe, config, dataset),
        )
        _check_disk(plan)
        return plan


def plan_model(
    recipe: Recipe, config: PreTrainedConfig, folder: ModelFolder | None, *, remote_code: bool = False
) -> ModelPlan:
    """Find what a recipe trains in a model, on the meta device."""
    skeleton = empty_model(config, recipe.task, remote_code=remote_code)
    targets, saved = prepare(skeleton, recipe)
    return ModelPlan(config, folder, skeleton, targets, saved, count(skeleton))


def prepare(model: PreTrainedModel, recipe: Recipe) -> tuple[list[Target], list[str]]:
    """Make a base trainable as the recipe says, in place; the same for the skeleton and the real model."""
    if recipe.method == "full":
        model.requires_grad_(True)
        return [], []
    saved = find_saved(model, recipe.lora.modules_to_save or [])
    saved = list(dict.fromkeys([*head_modules(model, recipe.task), *saved]))
    targets = find_targets(model, recipe.lora, saved) if recipe.method == "lora" else []
    attach(model, targets, recipe.lora.lora_dropout)
    freeze_base(model, saved)
    return targets, saved


def count(model: nn.Module) -> Counted:
    """Parameters, each shared one once."""
    parameters = list(model.parameters())
    return Counted(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))


def _read_rows(recipe: Recipe) -> tuple[Reading, Reading | None]:
    return read_train(recipe.dataset, recipe.task), read_eval(recipe.dataset, recipe.task)


def _labels(recipe: Recipe, config: PreTrainedConfig, train: Reading) -> list[str]:
    """The head's labels: those it was trained with, those an inline config asks for, else those in the rows."""
    found = labels_of([train])
    if len(found) < 2:
        raise DataError(f"every row has the same label ({', '.join(found) or 'none'}): there is nothing to tell apart")
    fixed = _fixed_labels(recipe, config)
    if fixed is None:
        return found
    unknown = [label for label in found if label not in fixed and label not in map(str, range(len(fixed)))]
    if unknown:
        raise DataError(
            f"the labels do not fit the head: the rows have {', '.join(unknown)}, the model knows {', '.join(fixed)}",
            "rename the labels, or start from a model without a classifier's head",
        )
    return fixed


def _fixed_labels(recipe: Recipe, config: PreTrainedConfig) -> list[str] | None:
    trained = any("SequenceClassification" in name for name in config.architectures or [])
    asked = "num_labels" in (recipe.model.config or {})
    return [str(config.id2label[index]) for index in range(config.num_labels)] if trained or asked else None


def _encode(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, labels: list[str], readings: tuple[Reading, Reading | None]
) -> Dataset:
    section = recipe.dataset
    encoder = LabelEncoder(section, tokenizer, labels) if labels else TextEncoder(section, tokenizer)
    if section.too_long == "split" and readings[0].format != "text":
        message = f"split cuts running text only, and these rows are {readings[0].format}"
        raise RecipeError([Mistake(("dataset", "too_long"), message, "use truncate, skip or error")])
    return build_dataset(section, partial(_examples, encoder), readings[0], readings[1], recipe.training.seed)


def _examples(encoder: TextEncoder | LabelEncoder, content: Content, where: str) -> list[Example]:
    return list(encoder.examples(content, where))


def _check_ids(dataset: Dataset, model: PreTrainedModel, loaded: LoadedRecipe) -> None:
    """Ids and positions that the model has no embedding for would crash, or worse, wrap around."""
    examples = [*dataset.train, *dataset.eval]
    largest = max(int(example.input_ids.max()) for example in examples)
    embeddings = model.get_input_embeddings()
    rows = getattr(embeddings, "num_embeddings", largest + 1)
    if largest >= rows:
        raise UsageError(
            f"the tokenizer gives id {largest}, and the model embeds ids below {rows} only",
            "set model.tokenizer to the model's own tokenizer",
        )
    limit = position_limit(model)
    longest = max(dataset.train_counts.longest, dataset.eval_counts.longest)
    if limit is not None and longest > limit:
        message = f"rows reach {longest} tokens, and the model has positions for {limit}"
        raise RecipeError([Mistake(("dataset", "max_length"), message, f"set dataset.max_length: {limit}")])


def position_limit(model: nn.Module) -> int | None:
    """How many positions a model with learned position embeddings has; RoBERTa's begin behind the pad id."""
    for name, module in model.named_modules():
        ending = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) and ending in ("wpe", "position_embeddings", "embed_positions"):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _schedule(recipe: Recipe, num_rows: int) -> tuple[StepPlan, int, int]:
    training = recipe.training
    steps = StepPlan(
        num_rows,
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        training.seed,
        recipe.dataset.shuffle,
    )
    total = training.max_steps or max(1, math.ceil(training.num_train_epochs * steps.steps_per_epoch))
    warmup = steps_in(training.warmup_steps, total)
    if training.warmup_steps >= 1 and warmup >= total:
        message = f"{warmup} steps of warm-up do not fit into a run of {total} steps"
        raise RecipeError([Mistake(("training", "warmup_steps"), message)])
    return steps, total, min(warmup, total - 1)


def disk_bytes(counted: Counted, recipe: Recipe) -> int:
    """What the output folder will hold: checkpoints with two moments each, and the final weights."""
    weights = 4 * counted.trainable
    checkpoints = recipe.training.save_total_limit + 2  # the best one, and the one being written
    final = weights if recipe.method == "lora" else 4 * counted.total
    base = 4 * counted.total if recipe.model.config is not None else 0
    return 3 * weights * checkpoints + final + base


def _check_disk(plan: Plan) -> None:
    path = Path(plan.recipe.output_dir)
    free = free_bytes(path)
    if plan.disk_bytes > free:
        needs, has = plan.disk_bytes / 1e9, free / 1e9
        raise StorageError(f"the run needs {needs:.1f} GB in {path}, and {has:.1f} GB are free")


def _notes(recipe: Recipe, config: PreTrainedConfig, dataset: Dataset) -> list[str]:
    """What a person should know, though nothing is wrong."""
    notes = []
    training = recipe.training
    if training.max_steps and "num_train_epochs" in training.model_fields_set:
        notes.append("max_steps is set, so num_train_epochs is not used")
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(dataset.train_counts.longest, dataset.eval_counts.longest)
    if isinstance(limit, int) and longest > limit:
        notes.append(f"rows reach {longest} tokens; the model was trained on at most {limit}")
    if not dataset.eval:
        notes.append("no evaluation rows: set dataset.eval_size to see what the training brings")
    return notes
