"""What excludes what in the section ``dataset``."""

from __future__ import annotations

from collections.abc import Iterator

from lora_cli.errors import Mistake
from lora_cli.recipe.rules.facts import Rule, was_changed
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.source import Source


def _new_tokens_are_an_adapter_s(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    path, tokens = ("dataset", "new_tokens"), recipe.dataset.new_tokens
    if tokens and recipe.method != "lora":
        yield Mistake(path, f"cannot be used with method: {recipe.method}", "use method: lora")
    if tokens and recipe.lora.init_from is not None:
        message = "cannot be added to those of the adapter in init_from"
        yield Mistake(path, message, "remove it; model.tokenizer can name the adapter's folder")
    for place, token in enumerate(tokens):
        if token in tokens[:place]:
            yield Mistake((*path, place), f"names {token} again", "remove it")


def _task_format(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    labelled = recipe.dataset.format == "labelled"
    if recipe.task == "sequence_classification" and not labelled and recipe.dataset.format != "auto":
        yield Mistake(("dataset", "format"), "must be labelled for task: sequence_classification")
    if recipe.task == "causal_lm" and labelled:
        yield Mistake(("dataset", "format"), "labelled rows belong to task: sequence_classification")
    if recipe.task == "sequence_classification":
        for key in ("system_prompt", "train_on_prompt", "chat_template"):
            if was_changed(recipe.dataset, "dataset", key, source):
                yield Mistake(("dataset", key), "has no effect on a classifier", "remove it")


def _split_is_for_text(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    data = recipe.dataset
    if data.too_long == "split" and (data.format not in ("auto", "text") or recipe.task != "causal_lm"):
        yield Mistake(
            ("dataset", "too_long"),
            "split cuts running text only: a cut dialogue would lose its beginning",
            "use truncate, skip or error",
        )


def _evaluation_source(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    data = recipe.dataset
    given = [key for key in ("eval_path", "eval_split", "eval_size") if getattr(data, key)]
    if "eval_size" in given and len(given) > 1:
        yield Mistake(("dataset", "eval_size"), f"cannot be combined with {given[0]}: that names evaluation rows")
    training = recipe.training
    if given:
        return
    if training.early_stopping_patience:
        yield Mistake(
            ("training", "early_stopping_patience"),
            "needs evaluation rows",
            "set dataset.eval_size, eval_path or eval_split",
        )
    if was_changed(training, "training", "metric_for_best_model", source):
        yield Mistake(
            ("training", "metric_for_best_model"),
            "needs evaluation rows",
            "set dataset.eval_size, eval_path or eval_split",
        )


RULES: list[Rule] = [
    _new_tokens_are_an_adapter_s,
    _task_format,
    _split_is_for_text,
    _evaluation_source,
]
