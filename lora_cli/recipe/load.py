"""From a file and ``KEY=VALUE`` arguments to a checked recipe, or to all of its mistakes at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_cli.errors import KeyPath, Mistake, RecipeError, SeveralErrors, UsageError
from lora_cli.recipe.messages import mistakes_of
from lora_cli.recipe.rules import check_rules
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.source import Place, Source
from lora_cli.recipe.yaml_text import Mistakes, parse_yaml

SHORTHANDS = {"model": "path", "dataset": "path"}  # `model: x` means `model: {path: x}`
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, the text it was read from, and where each key stands."""

    recipe: Recipe
    source: Source
    text: str


def load_recipe(path: Path, overrides: list[str] | None = None) -> LoadedRecipe:
    """Read and check a recipe.

    Raises ``RecipeError`` with every mistake of file and arguments, ``UsageError`` where there is no
    recipe to read.
    """
    text = _read_text(path)
    source = Source(str(path), text.splitlines())
    try:
        data = parse_yaml(text, source)
        if not isinstance(data, dict):
            raise UsageError(f"{path} is not a recipe: it should hold keys and values", _SMALLEST)
        for override in overrides or []:
            _override(data, override, source)
    except Mistakes as error:
        raise RecipeError(error.mistakes, source) from None
    for section in SHORTHANDS:
        _lift_shorthand(data, section, source)
    return LoadedRecipe(_checked(data, source), source, text)


@contextmanager
def located(loaded: LoadedRecipe) -> Iterator[None]:
    """Give recipe mistakes that were found late the place where the key stands."""
    try:
        yield
    except (RecipeError, SeveralErrors) as error:
        for single in error.errors if isinstance(error, SeveralErrors) else [error]:
            if isinstance(single, RecipeError):
                single.source = single.source or loaded.source
        raise


_SMALLEST = "the smallest recipe is three keys: model, dataset and output_dir"


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; a recipe is a YAML file")
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES} bytes: is this a recipe?")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no recipe {path}", _similar_file(path)) from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{path} is not UTF-8 text: line {line} holds the byte {raw[error.start]:#04x}") from None


def _similar_file(path: Path) -> str | None:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None


def _override(data: dict[str, Any], argument: str, source: Source) -> None:
    """Set one dotted key from ``KEY=VALUE``; the value is YAML, like in the file."""
    name, equals, text = argument.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        raise UsageError(f"{argument!r} is not KEY=VALUE", "write for example training.learning_rate=1e-4")
    section = data
    for depth, key in enumerate(keys[:-1], start=1):
        if depth == 1:
            _lift_shorthand(data, key, source)
        if section.get(key) is None:
            section[key] = {}
            source.places[keys[:depth]] = Place(argument=argument)
        section = section[key]
        if not isinstance(section, dict):
            source.places[keys] = Place(argument=argument)
            message = f"{'.'.join(keys[:depth])} is not a section"
            raise Mistakes([Mistake(keys, message, at_key=True)])
    _forget(source, keys)
    source.places[keys] = Place(argument=argument)
    section[keys[-1]] = parse_yaml(text, source, at=keys, argument=argument)


def _forget(source: Source, path: KeyPath) -> None:
    """Places below an overridden key no longer exist."""
    for known in [known for known in source.places if known[: len(path)] == path]:
        del source.places[known]


def _lift_shorthand(data: dict[str, Any], section: str, source: Source) -> None:
    """Turn ``model: x`` into ``model: {path: x}``, keeping the place of ``x``."""
    if section in SHORTHANDS and isinstance(data.get(section), str | list):
        data[section] = {SHORTHANDS[section]: data[section]}
        source.places[(section, SHORTHANDS[section])] = source.place((section,))


def _checked(data: dict[str, Any], source: Source) -> Recipe:
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(mistakes_of(error, data), source) from None
    mistakes = check_rules(recipe, source)
    if mistakes:
        raise RecipeError(mistakes, source)
    return recipe
