"""What excludes what: rules that look at more than one key.

A rule is a function from a recipe to the mistakes it finds, listed by hand below the rules of its section. Rules that
need rows or a model stand where those are known (``commands/plan.py``).
"""

from __future__ import annotations

from lora_cli.errors import Mistake
from lora_cli.recipe.rules import dataset, lora, model, training
from lora_cli.recipe.rules.facts import Rule
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.source import Source

RULES: list[Rule] = [*model.RULES, *lora.RULES, *dataset.RULES, *training.RULES]


def check_rules(recipe: Recipe, source: Source) -> list[Mistake]:
    """Every rule that this recipe breaks."""
    return [mistake for rule in RULES for mistake in rule(recipe, source)]
