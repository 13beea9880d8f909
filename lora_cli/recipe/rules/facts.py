"""What several rules, and others, ask of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lora_cli.errors import Mistake
from lora_cli.recipe.schema import Recipe, Section
from lora_cli.recipe.source import Source

Rule = Callable[[Recipe, Source], Iterator[Mistake]]  # the mistakes that it finds

EVALUATION_METRICS = {
    "causal_lm": ("eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_exact_match"),
    "sequence_classification": (
        "eval_loss",
        "eval_accuracy",
        "eval_macro_f1",
        "eval_matthews_correlation",
    ),
}

# initialisations away from zero, of the base's own weights: what they learn counts from where A and B begin
STARTS_FROM_WEIGHTS = ("pissa", "olora", "lora_ga")


def is_quantized(recipe: Recipe) -> bool:
    """Whether some of the base's weights are packed while the run lasts."""
    return recipe.model.quantization != "none" or recipe.lora.is_loftq


def was_changed(section: Section, name: str, key: str, source: Source) -> bool:
    """Whether a key was written down with another value than its default: resolved.yaml writes them all."""
    field = type(section).model_fields[key]
    default = field.get_default(call_default_factory=True, validated_data=section.model_dump())
    return source.was_given(name, key) and getattr(section, key) != default
