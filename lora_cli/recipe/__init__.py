"""Recipes: what may stand in one (schema), how it is read (load), and what excludes what (rules)."""

from lora_cli.recipe.load import LoadedRecipe, load_recipe, located
from lora_cli.recipe.schema import DatasetSection, LoftQSection, LoraSection, ModelSection, Recipe, TrainingSection

__all__ = [
    "DatasetSection",
    "LoadedRecipe",
    "LoftQSection",
    "LoraSection",
    "ModelSection",
    "Recipe",
    "TrainingSection",
    "load_recipe",
    "located",
]
