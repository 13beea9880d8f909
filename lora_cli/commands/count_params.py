"""`lora count-params`: parameters by tensor, from ``config.json`` alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from lora_cli.adapters.files import CONFIG
from lora_cli.adapters.injection import base_name
from lora_cli.commands.fitted import attach_fitted, fit_adapter
from lora_cli.commands.labels import fixed_labels
from lora_cli.commands.trainable import Counted, count, plan_model
from lora_cli.data.dataset import labels_of, read_train
from lora_cli.data.files import is_local
from lora_cli.errors import LoraError, UsageError
from lora_cli.hub import model_folder
from lora_cli.models import (
    AUTO_CLASSES,
    add_tokens,
    build_empty,
    empty_model,
    load_config,
    load_tokenizer,
    read_config,
    set_labels,
)
from lora_cli.recipe import Recipe, load_recipe, located


@dataclass(frozen=True)
class TensorCount:
    name: str
    shape: tuple[int, ...]
    numel: int
    learnable: bool


@dataclass(frozen=True)
class ParameterCount:
    """Every parameter of a model, each shared one once, under the name the base gives it."""

    tensors: list[TensorCount]
    counted: Counted

    def to_dict(self) -> dict[str, Any]:
        return {
            "total": self.counted.total,
            "learnable": self.counted.trainable,
            "percent": round(self.counted.percent, 4),
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    def __str__(self) -> str:
        c = self.counted
        return f"Total parameters: {c.total:,}, thereof learnable: {c.trainable:,} ({c.percent:.4f}%)"


def count_params(
    what: str, overrides: list[str] | None = None, *, base: str | None = None, remote_code: bool = False
) -> ParameterCount:
    """Count a recipe's model with its adapters, an adapter folder on its base, or a model as it is."""
    path = Path(what).expanduser()
    if base is not None and not (path / CONFIG).is_file():
        raise UsageError(f"--base belongs to an adapter, and {what} is none")
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _of_recipe(path, overrides or [], remote_code)
    if overrides:
        raise UsageError(f"KEY=VALUE belongs to a recipe, and {what} is none")
    if (path / CONFIG).is_file():
        fitted = fit_adapter(path, base, weights=False, remote_code=remote_code)
        attach_fitted(fitted.skeleton, fitted)
        return counted(fitted.skeleton)
    folder = model_folder(what, weights=False, remote_code=remote_code).path
    return counted(_model(read_config(folder, remote_code=remote_code), remote_code))


def counted(model: PreTrainedModel) -> ParameterCount:
    tensors = [
        TensorCount(base_name(name), tuple(p.shape), p.numel(), p.requires_grad) for name, p in model.named_parameters()
    ]
    return ParameterCount(tensors, count(model))


def _of_recipe(path: Path, overrides: list[str], remote_code: bool) -> ParameterCount:
    loaded = load_recipe(path, overrides)
    with located(loaded):
        config, folder = load_config(loaded.recipe.model, remote_code=remote_code)
        if labels := _labels(loaded.recipe, config):
            set_labels(config, labels)
        new_ids = _new_ids(loaded.recipe, remote_code)
        return counted(plan_model(loaded.recipe, config, folder, new_ids, remote_code=remote_code).skeleton)


def _new_ids(recipe: Recipe, remote_code: bool) -> list[int]:
    """Only new tokens ask for the tokenizer."""
    tokens = recipe.dataset.new_tokens
    return add_tokens(load_tokenizer(recipe.model, remote_code=remote_code), tokens) if tokens else []


def _labels(recipe: Recipe, config: PreTrainedConfig) -> list[str]:
    """A new head is as wide as the rows have labels; without rows at hand, as the configuration says."""
    if recipe.task != "sequence_classification" or fixed_labels(recipe, config) is not None:
        return []
    try:
        local = all(is_local(path) for path in recipe.dataset.path)
        return labels_of([read_train(recipe.dataset, recipe.task)]) if local else []
    except LoraError:  # the rows are not needed for counting, only welcome
        return []


def _model(config: PreTrainedConfig, remote_code: bool) -> PreTrainedModel:
    """The model that ``config.json`` names, whatever its task."""
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    if isinstance(model_class, type) and PreTrainedModel in model_class.__mro__[1:]:
        return build_empty(config, partial(model_class, config))
    task = next((task for task, auto in AUTO_CLASSES.items() if type(config) in auto._model_mapping), None)
    if task is None:
        raise UsageError(f"{config.model_type} models cannot be built from a configuration alone")
    return empty_model(config, task, remote_code=remote_code)
