"""The schema in words: the key table of the README, and a JSON schema for editors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lora_cli.recipe.schema import Recipe

_STATED_DEFAULT = re.compile(r" \(default: (.+)\)$")


def json_schema() -> dict[str, Any]:
    """Sections may also be written as their shorthand, which the schema says too."""
    schema = Recipe.model_json_schema()
    text: dict[str, Any] = {"type": "string"}
    shorthands = {"model": [text], "dataset": [text, {"type": "array", "items": text}]}
    for section, forms in shorthands.items():
        schema["properties"][section] = {"anyOf": [*forms, schema["properties"][section]]}
    return schema


def key_table() -> str:
    """A Markdown table with one line a key."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    return "\n".join([*rows, *_rows(Recipe, "")])


def _rows(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, field in section.model_fields.items():
        yield _row(prefix + key, field)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _rows(field.annotation, f"{prefix}{key}.")


def _row(name: str, field: FieldInfo) -> str:
    text = field.description or ""
    default = _default(field)
    if match := _STATED_DEFAULT.search(text):  # a default that depends on other keys is told in words
        text, default = text.replace(match[0], ""), match[1]
    values = [value for value in _choices(field.annotation) if value not in text]
    choices = f" (`{'`, `'.join(values)}`)" if values else ""
    return f"| `{name}` | {default} | {text}{choices} |"


def _choices(annotation: Any) -> list[str]:
    """The members of a Literal that the description does not spell out."""
    members = [get_args(part) for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    return [str(value) for group in members for value in group]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    if isinstance(field.default, BaseModel):
        return ""
    if field.default is None or field.default in ({}, []):
        return "none"
    value = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{value}`"
