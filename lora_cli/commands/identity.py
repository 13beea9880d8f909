"""What makes a run the same run: the recipe's keys that change its numbers, its rows and its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lora_cli.adapters.files import WEIGHTS
from lora_cli.commands.plan import Plan
from lora_cli.errors import KeyPath, Mistake, RecipeError
from lora_cli.recipe import Recipe
from lora_cli.storage import sha256

# Keys that change what is shown, kept or where, but no number of the training.
FREE_KEYS = {
    "output_dir",
    "dataset.path",  # the rows themselves are compared
    "dataset.eval_path",
    "lora.init_from",  # so is the adapter
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.report_to",
    "training.per_device_eval_batch_size",
    "training.gradient_checkpointing",  # the cures for too little memory: they give the same steps
    "training.cache_frozen_layers",
    "training.per_device_train_batch_size",  # the rows of a step are compared
    "training.gradient_accumulation_steps",
    "training.global_batch_size",
    "training.strategy",  # where the frozen base lies
    "training.use_cpu",  # a machine with another device goes on, too
}


def identity(plan: Plan, base_fingerprint: str) -> dict[str, Any]:
    """Flat, so that a difference has a name."""
    from_adapter = plan.recipe.lora.init_from
    return fixed_keys(plan.recipe) | {
        "adapter": None if from_adapter is None else sha256(Path(from_adapter).expanduser() / WEIGHTS),
        "rows": plan.dataset.fingerprint(),
        "rows_per_step": plan.steps.rows_per_step,
        "base": base_fingerprint,
        "dtype": str(plan.dtype).removeprefix("torch."),
    }


def fixed_keys(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in _flat(recipe, "") if key not in FREE_KEYS}


def _flat(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _defaults() -> dict[str, Any]:
    """What a run was given in a key that there was not yet when it began."""
    found: dict[str, Any] = {}
    for section, field in Recipe.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            continue
        for key, inner in field.annotation.model_fields.items():
            if inner.default is PydanticUndefined:
                continue  # required, or made from the others
            name, value = f"{section}.{key}", inner.default
            found |= dict(_flat(value, f"{name}.")) if isinstance(value, BaseModel) else {name: value}
    return found


_PLACES: dict[str, KeyPath] = {
    "rows": ("dataset", "path"),
    "rows_per_step": ("training", "per_device_train_batch_size"),
    "base": ("model", "path"),
    "adapter": ("lora", "init_from"),
    "dtype": ("model", "dtype"),
}
_CURE = "put it back to go on, type --fresh to start over, or choose another output_dir"


def check_same_run(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ``RecipeError`` with every difference."""
    mistakes = []
    then = {name: value for name, value in _defaults().items() if name in now} | then
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) == now.get(name):
            continue
        path = _PLACES.get(name, tuple(name.split(".")))
        before, after = (json.dumps(values.get(name), ensure_ascii=False) for values in (then, now))
        if name in ("rows", "base", "adapter"):
            what = "holds other rows" if name == "rows" else "holds other weights"
            message = f"{what} than when this run began"
        elif name == "rows_per_step":
            message = (
                f"x gradient_accumulation_steps x processes (or global_batch_size) made {before} rows a step when this "
                f"run began, and makes {after}"
            )
        else:
            message = f"was {before} when this run began, and is {after}"
        mistakes.append(Mistake(path, message, _CURE))
    if mistakes:
        raise RecipeError(mistakes)
