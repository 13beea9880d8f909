"""What excludes what in the section ``model``."""

from __future__ import annotations

from collections.abc import Iterator

from lora_cli.errors import Mistake
from lora_cli.recipe.rules.facts import STARTS_FROM_WEIGHTS, Rule
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.source import Source


def _one_model(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    model = recipe.model
    if (model.path is None) == (model.config is None):
        message = (
            "needs a path, or a config for a random model"
            if model.path is None
            else ("has both a path and a config: a config builds a random model")
        )
        yield Mistake(("model",), message)
    if model.config is not None and "model_type" not in model.config:
        yield Mistake(("model", "config"), "needs model_type, for example llama")
    if model.config is not None and model.tokenizer is None:
        yield Mistake(("model",), "a random model has no tokenizer of its own: set model.tokenizer")
    if model.revision and model.path is None:
        yield Mistake(("model", "revision"), "belongs to model.path")


def _attention_is_no_code(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if "/" in recipe.model.attn_implementation:
        yield Mistake(
            ("model", "attn_implementation"),
            "names code on the hub, and a recipe is data",
            "use a name that transformers knows, such as sdpa or eager",
        )


def _float32_for_full(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.method == "full" and recipe.model.dtype in ("bfloat16", "float16"):
        yield Mistake(
            ("model", "dtype"),
            f"{recipe.model.dtype} weights lose small updates when they are trained in full",
            "use float32 (or auto) with method: full",
        )


def _quantized_is_for_lora(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    kind, method = recipe.model.quantization, recipe.method
    if kind != "none" and method != "lora":
        what = "trains the weights themselves" if method == "full" else "writes a whole model, of plain weights"
        yield Mistake(
            ("model", "quantization"),
            f"{kind} cannot be combined with method: {method}, which {what}",
            "remove it, or use method: lora",
        )


def _quantized_begins_as_it_is(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    kind, start = recipe.model.quantization, str(recipe.lora.init_lora_weights).lower()
    if kind != "none" and recipe.lora.is_loftq:
        yield Mistake(
            ("model", "quantization"),
            f"{kind} cannot be combined with init_lora_weights: loftq, which quantizes the base itself, from its dense "
            "weights",
            "remove it; lora.loftq_config.loftq_bits says how many bits",
        )
    if kind != "none" and start.startswith(STARTS_FROM_WEIGHTS):
        yield Mistake(
            ("lora", "init_lora_weights"),
            f"{start} begins from the base's own weights, and an {kind} base no longer has them",
            "use true, gaussian, orthogonal or eva, or remove model.quantization",
        )


RULES: list[Rule] = [
    _one_model,
    _attention_is_no_code,
    _float32_for_full,
    _quantized_is_for_lora,
    _quantized_begins_as_it_is,
]
