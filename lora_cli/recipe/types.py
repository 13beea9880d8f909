"""The value types of a recipe that plain Python types do not cover, each with its own plain message.

Every type is one function: it takes what YAML gave and returns the value, or raises with the words that
the user reads after the key's name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

Initialisations = ("gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga", "loftq")
PISSA_NITER = re.compile(r"pissa_niter_[1-9][0-9]?")
Trackers = ("tensorboard", "wandb", "trackio")
SPLIT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<start>-?[0-9]+%?)?:(?P<stop>-?[0-9]+%?)?\])?")


def wrong(message: str) -> PydanticCustomError:
    """The error whose text is shown as it stands."""
    return PydanticCustomError("plain", "{message}", {"message": message})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float) and 0 < value < 1


def count_or_fraction(value: Any) -> int | float:
    if (_is_int(value) and value >= 0) or (isinstance(value, float) and 0 <= value < 1):
        return value
    raise wrong(f"must be a count (0 or more) or a fraction between 0 and 1, not {_yaml(value)}")


def cadence(value: Any) -> int | float | str:
    if value == "epoch" or (_is_int(value) and value >= 1) or _is_fraction(value):
        return value
    raise wrong(f"must be a number of steps, a fraction of the run between 0 and 1, or epoch, not {_yaml(value)}")


def batch_size(value: Any) -> int | str:
    if value == "auto" or (_is_int(value) and value >= 1):
        return value
    raise wrong(f"must be a number of rows (1 or more) or auto, not {_yaml(value)}")


def strings(value: Any) -> list[str]:
    """One string or a list of strings; always a list afterwards."""
    items = [value] if isinstance(value, str) else value
    if isinstance(items, list) and items and all(isinstance(item, str) and item for item in items):
        return items
    raise wrong(f"must be a text or a list of texts, not {_yaml(value)}")


def string_list(value: Any) -> list[str]:
    """As ``strings``, and there may be none."""
    return [] if value == [] else strings(value)


def text_or_texts(value: Any) -> str | list[str]:
    """One string or a list of strings or none, kept as written: one string may have a meaning of its own."""
    string_list(value)
    return value


def split(value: Any) -> str:
    if isinstance(value, str) and SPLIT.fullmatch(value):
        return value
    raise wrong(f"must be a split such as train, train[:1000] or train[10%:50%], not {_yaml(value)}")


def initialisation(value: Any) -> bool | str:
    if value is True or value in Initialisations or (isinstance(value, str) and PISSA_NITER.fullmatch(value)):
        return value
    close = difflib.get_close_matches(str(value), Initialisations, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    known = f"true, {', '.join(Initialisations)} or pissa_niter_N (N from 1 to 99)"
    raise wrong(f"must be {known}, not {_yaml(value)}{hint}")


def recomputation(value: Any) -> bool | str:
    if isinstance(value, bool) or value in ("selective", "offload"):
        return value
    raise wrong(f"must be true, false, selective or offload, not {_yaml(value)}")


def trackers(value: Any) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if items in (["none"], []):
        return []
    if isinstance(items, list) and all(item in Trackers for item in items):
        return items
    raise wrong(f"must be none, {', '.join(Trackers)}, or a list of them, not {_yaml(value)}")


_UNLIKE_TEXT = re.compile(r"true|false|null|[-+.0-9e]*")  # without its quotes it would be something else


def _yaml(value: Any) -> str:
    """The value as a recipe writes it; long ones only by their kind."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, str) and _UNLIKE_TEXT.fullmatch(value):
        return f"the text '{value}'"
    text = str(value)
    return text if len(text) < 60 else "a long value"


def _type(check: Callable[[Any], Any], schema: dict[str, Any]) -> Any:
    return (PlainValidator(check), WithJsonSchema(schema))


_STRINGS: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}

CountOrFraction = Annotated[int | float, *_type(count_or_fraction, {"type": "number", "minimum": 0})]
Cadence = Annotated[
    int | float | Literal["epoch"],
    *_type(cadence, {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "epoch"}]}),
]
BatchSize = Annotated[
    int | Literal["auto"],
    *_type(batch_size, {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]
StringList = Annotated[list[str], *_type(string_list, _STRINGS)]
Strings = Annotated[list[str], *_type(strings, _STRINGS)]
TextOrTexts = Annotated[str | list[str], *_type(text_or_texts, _STRINGS)]
Split = Annotated[str, *_type(split, {"type": "string"})]
Initialisation = Annotated[
    bool | str,
    *_type(initialisation, {"anyOf": [{"enum": [True, *Initialisations]}, {"pattern": f"^{PISSA_NITER.pattern}$"}]}),
]
Recomputation = Annotated[bool | str, *_type(recomputation, {"enum": [False, True, "selective", "offload"]})]
TrackerNames = Annotated[list[str], *_type(trackers, _STRINGS)]
