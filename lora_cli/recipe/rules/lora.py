"""What excludes what in the section ``lora``."""

from __future__ import annotations

from collections.abc import Iterator

from lora_cli.errors import Mistake
from lora_cli.recipe.rules.facts import Rule, was_changed
from lora_cli.recipe.schema import LoraSection, Recipe
from lora_cli.recipe.source import Source

OF_AN_ADAPTER = (
    *("r", "lora_alpha", "use_rslora", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "init_lora_weights"),
    "trainable_token_indices",
)


def _method_keys(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.method == "lora":
        return
    allowed = {"modules_to_save"} if recipe.method == "head" else set()
    for key in LoraSection.model_fields:
        if was_changed(recipe.lora, "lora", key, source) and key not in allowed:
            yield Mistake(("lora", key), f"has no effect with method: {recipe.method}", "remove it, or type lora={}")
    if recipe.method == "head" and recipe.task == "causal_lm" and not recipe.lora.modules_to_save:
        yield Mistake(
            ("method",),
            "head trains a classifier's head, and a causal_lm has none",
            "name the modules in lora.modules_to_save, or use task: sequence_classification",
        )


def _adapter_brings_its_own(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.lora.init_from is None:
        return
    for key in OF_AN_ADAPTER:
        if was_changed(recipe.lora, "lora", key, source):
            yield Mistake(("lora", key), "comes from the adapter in init_from", "remove it")


def _experts_are_plain(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    """What PEFT's files cannot hold of a stacked parameter, or no formula gives."""
    if not recipe.lora.target_parameters:
        return
    reasons = {
        "lora_dropout": "the experts' inputs are not this adapter's to drop",
        "use_dora": "a stack of experts has no magnitudes in the file format",
        "rank_pattern": "a stack has one rank, r",
        "alpha_pattern": "a stack has one scale, lora_alpha / r",
    }
    for key, reason in reasons.items():
        if was_changed(recipe.lora, "lora", key, source):
            yield Mistake(("lora", key), f"cannot be combined with target_parameters: {reason}", "remove one of them")
    if recipe.lora.init_lora_weights not in (True, "gaussian"):
        yield Mistake(
            ("lora", "init_lora_weights"),
            f"{recipe.lora.init_lora_weights} cannot be combined with target_parameters: it begins single matrices",
            "use true or gaussian",
        )


def _something_is_adapted(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    lora = recipe.lora
    if recipe.method == "lora" and lora.init_from is None and not lora.target_modules and not lora.target_parameters:
        message = "names no module, and target_parameters none either: nothing would be adapted"
        yield Mistake(("lora", "target_modules"), message, "write all-linear, or name modules")


def _orthogonal_is_even(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.lora.init_lora_weights != "orthogonal":
        return
    odd = [(("lora", "rank_pattern", name), r) for name, r in recipe.lora.rank_pattern.items() if r % 2]
    for path, r in [*([(("lora", "r"), recipe.lora.r)] if recipe.lora.r % 2 else []), *odd]:
        yield Mistake(path, f"must be even for init_lora_weights: orthogonal, not {r}", f"use {r + 1}")


def _config_of_its_kind(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    kinds = {"eva_config": "eva", "lora_ga_config": "lora_ga", "loftq_config": "loftq"}
    for key, kind in kinds.items():
        if recipe.lora.init_lora_weights != kind and was_changed(recipe.lora, "lora", key, source):
            yield Mistake(("lora", key), f"belongs to init_lora_weights: {kind}", "remove it, or ask for that")


def _each_row_once(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    ids = recipe.lora.trainable_token_indices
    for place, token in enumerate(ids):
        if token in ids[:place]:
            yield Mistake(("lora", "trainable_token_indices", place), f"names {token} again", "remove it")


RULES: list[Rule] = [
    _method_keys,
    _adapter_brings_its_own,
    _experts_are_plain,
    _something_is_adapted,
    _orthogonal_is_even,
    _config_of_its_kind,
    _each_row_once,
]
