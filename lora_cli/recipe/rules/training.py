"""What excludes what in the section ``training``."""

from __future__ import annotations

from collections.abc import Iterator

from lora_cli.errors import Mistake
from lora_cli.recipe.rules.facts import EVALUATION_METRICS, STARTS_FROM_WEIGHTS, Rule, was_changed
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.source import Source


def _start_is_not_rounded(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    kind = str(recipe.lora.init_lora_weights)
    if kind.startswith(STARTS_FROM_WEIGHTS) and recipe.training.save_dtype in ("bfloat16", "float16"):
        yield Mistake(
            ("training", "save_dtype"),
            f"{recipe.training.save_dtype} would round away what an adapter with init_lora_weights: {kind} learns: "
            "a small difference of two large products",
            "use auto or float32",
        )


def _training_of_adapters(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    for key in ("loraplus_lr_ratio", "save_dtype"):
        if recipe.method != "lora" and was_changed(recipe.training, "training", key, source):
            yield Mistake(("training", key), f"has no effect with method: {recipe.method}", "remove it")


def _known_metric(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    known = EVALUATION_METRICS[recipe.task]
    if recipe.training.metric_for_best_model not in known:
        yield Mistake(("training", "metric_for_best_model"), f"must be one of {', '.join(known)}")


def _warmup_fits(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    training = recipe.training
    if training.max_steps and training.warmup_steps >= 1 and training.warmup_steps >= training.max_steps:
        yield Mistake(
            ("training", "warmup_steps"),
            f"{training.warmup_steps} steps of warm-up do not fit into {training.max_steps} steps",
        )


def _one_batch_size(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    both = ("global_batch_size", "gradient_accumulation_steps")
    if recipe.training.global_batch_size is not None and all(source.was_given("training", key) for key in both):
        yield Mistake(
            ("training", "gradient_accumulation_steps"),
            "cannot be combined with global_batch_size: the accumulation follows from that",
            "name one of them",
        )


def _auto_tries_alone(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.training.strategy == "fsdp" and recipe.training.per_device_train_batch_size == "auto":
        yield Mistake(
            ("training", "per_device_train_batch_size"),
            "auto cannot be combined with strategy: fsdp: each process tries sizes by itself, and its layers need all",
            "write a number of rows",
        )


def _fsdp_is_for_lora(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.training.strategy == "fsdp" and recipe.method != "lora":
        yield Mistake(
            ("training", "strategy"),
            f"fsdp shards a base that stays frozen, and method: {recipe.method} writes a whole model",
            "use ddp, or method: lora",
        )


def _fsdp_runs_every_layer(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    training = recipe.training
    if training.strategy != "fsdp":
        return
    if training.cache_frozen_layers != "none":
        yield Mistake(
            ("training", "cache_frozen_layers"),
            "cannot be combined with fsdp: a process that skips a layer is missed by those that gather it",
            "use strategy: ddp, or remove it",
        )
    if training.gradient_checkpointing == "offload":
        yield Mistake(
            ("training", "gradient_checkpointing"),
            "offload cannot be combined with fsdp: it runs a layer's backward pass on its own, out of the order in "
            "which layers are gathered",
            "use true or selective",
        )


RULES: list[Rule] = [
    _start_is_not_rounded,
    _training_of_adapters,
    _known_metric,
    _warmup_fits,
    _one_batch_size,
    _auto_tries_alone,
    _fsdp_is_for_lora,
    _fsdp_runs_every_layer,
]
