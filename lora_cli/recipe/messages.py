"""What pydantic found wrong, in the words a user reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lora_cli.errors import KeyPath, Mistake
from lora_cli.recipe.schema import Recipe

# Keys that people bring from other tools (or with their section, where another one has such a key), and what to write.
FOREIGN_KEYS = {
    "rank": "did you mean lora.r?",
    "lora_r": "did you mean lora.r?",
    "lora_target_linear": "write lora.target_modules: all-linear",
    "base_model": "did you mean model?",
    "model.name": "did you mean model.path?",
    "model_name_or_path": "did you mean model.path?",
    "data": "did you mean dataset.path?",
    "file": "did you mean dataset.path?",
    "files": "did you mean dataset.path?",
    "train_file": "did you mean dataset.path?",
    "data_files": "did you mean dataset.path?",
    "dataset_name": "did you mean dataset.path?",
    "lr": "did you mean training.learning_rate?",
    "epochs": "did you mean training.num_train_epochs?",
    "num_epochs": "did you mean training.num_train_epochs?",
    "batch_size": "did you mean training.per_device_train_batch_size?",
    "micro_batch_size": "did you mean training.per_device_train_batch_size?",
    "per_device_batch_size": "did you mean training.per_device_train_batch_size?",
    "sequence_len": "did you mean dataset.max_length?",
    "max_seq_length": "did you mean dataset.max_length?",
    "cutoff_len": "did you mean dataset.max_length?",
    "optimizer": "the optimizer is AdamW",
    "load_best_model_at_end": "the best adapter is always the one that is delivered",
    "eval_strategy": "eval_steps takes a number of steps, a fraction of the run, or epoch",
    "evaluation_strategy": "eval_steps takes a number of steps, a fraction of the run, or epoch",
    "save_strategy": "save_steps takes a number of steps, a fraction of the run, or epoch",
    "bf16": "write model.dtype: bfloat16",
    "fp16": "write model.dtype: float16",
    "bias": "biases stay frozen: servers such as vLLM refuse adapters that train them",
    "task_type": "write task: causal_lm or task: sequence_classification",
    "trust_remote_code": "a recipe cannot allow remote code; type the flag --trust-remote-code",
    "load_in_4bit": "write model.quantization: nf4",
    "load_in_8bit": "write model.quantization: int8",
    "quantization_bit": "write model.quantization: nf4 (4 bits) or int8 (8 bits)",
    "packing": "rows are never packed into one another",
    "resume_from_checkpoint": "the same command resumes by itself",
    "overwrite_output_dir": "to start over, type the flag --fresh",
    "warmup_ratio": "write training.warmup_steps with a fraction below 1",
    "logging_dir": "everything is written below output_dir",
    "optim": "the optimizer is AdamW",
}


def section_keys(path: KeyPath) -> list[str]:
    """The keys that the section at ``path`` knows; none for a free mapping."""
    model: Any = Recipe
    for key in path:
        field = model.model_fields.get(key)
        model = field.annotation if field else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


def all_keys() -> list[str]:
    """Every dotted key of a recipe."""
    return list(_keys_below(()))


def _keys_below(path: KeyPath) -> Iterator[str]:
    for key in section_keys(path):
        yield ".".join(map(str, (*path, key)))
        yield from _keys_below((*path, key))


def mistakes_of(error: ValidationError, data: Any) -> list[Mistake]:
    """One mistake per key, in pydantic's order."""
    mistakes: dict[KeyPath, Mistake] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "default_factory_not_called":  # follows from another mistake in its section
            continue
        path = _known_path(detail["loc"], data)
        mistakes.setdefault(path, _mistake(path, detail))
    return list(mistakes.values())


def _known_path(location: tuple[int | str, ...], data: Any) -> KeyPath:
    """pydantic adds names of its own (union members, ``[key]``) behind the keys; leave them out."""
    path: list[int | str] = []
    for part in location:
        inside = isinstance(data, list) if isinstance(part, int) else isinstance(data, dict)
        path.append(part)
        if not inside or (isinstance(data, dict) and part not in data):
            return tuple(path[:-1]) if not isinstance(data, dict) else tuple(path)
        data = data[part]
    return tuple(path)


def _mistake(path: KeyPath, detail: ErrorDetails) -> Mistake:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        section = ".".join(map(str, path[:-1]))
        message = f"unknown key in {section}" if section else "unknown key"
        return Mistake(path, message, _spelling(path), at_key=True)
    if kind == "missing":
        return Mistake(path, "is required")
    if kind == "literal_error":
        return Mistake(path, f"must be {_either(context['expected'])}, not {_shown(value)}", _choice(context, value))
    return Mistake(path, _message(kind, context, value))


def _message(kind: str, context: dict[str, Any], value: Any) -> str:
    bounds = {
        "greater_than_equal": "must be {ge} or more",
        "greater_than": "must be more than {gt}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be {le} or less",
        "string_too_short": "must not be empty",
        "plain": "{message}",
    }
    kinds = {
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a text",
        "list_type": "a list",
        "dict_type": "a mapping of keys to values",
        "model_type": "a section with keys",
    }
    if kind in bounds:
        return bounds[kind].format(**{key: _number(part) for key, part in context.items()})
    if kind in kinds:
        return f"must be {kinds[kind]}, not {_shown(value)}"
    return f"is not valid: {kind.replace('_', ' ')}"


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text '{value}'" if len(value) < 60 else "a long text"
    kinds: dict[type, str] = {dict: "a section", list: "a list"}
    return kinds.get(type(value), str(value) if len(str(value)) < 60 else "a long number")


def _either(expected: str) -> str:
    """pydantic quotes the members of a Literal; plain words read better."""
    return expected.replace("'", "")


def _choice(context: dict[str, Any], value: Any) -> str | None:
    options = _either(context["expected"]).replace(" or ", ", ").split(", ")
    close = difflib.get_close_matches(str(value).lower(), options, n=1)
    return f"did you mean {close[0]}?" if close else None


def _spelling(path: KeyPath) -> str | None:
    key = str(path[-1])
    siblings = section_keys(path[:-1])
    if foreign := FOREIGN_KEYS.get(".".join(map(str, path)), FOREIGN_KEYS.get(key)):
        return foreign
    close = difflib.get_close_matches(key.lower(), siblings, n=1, cutoff=0.75)
    if close:
        return f"did you mean {close[0]}?"
    elsewhere = [dotted for dotted in all_keys() if dotted.split(".")[-1] == key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    close = difflib.get_close_matches(key.lower(), siblings, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"keys here: {', '.join(siblings)}" if siblings else None
