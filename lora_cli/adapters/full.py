"""Modules that are trained in full, in float32, inside a model that computes in another type."""

from __future__ import annotations

import torch
from torch import nn
from transformers.utils import ModelOutput


def train_in_full(module: nn.Module, dtypes_before: dict[int, torch.dtype] | None = None) -> None:
    """Train a module as float32 inside a model that computes in another dtype.

    Hooks cast its floating inputs up and its outputs back, so the model's code does not notice. ``dtypes_before`` tells
    by parameter what a weight was stored in that is float32 already, since it is tied to one.
    """
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # has no forward, so its hooks would never run
        for child in module.children():
            train_in_full(child, dtypes_before)
        return
    dtypes = [(dtypes_before or {}).get(id(parameter), parameter.dtype) for parameter in module.parameters()]
    module.requires_grad_(True)
    if set(dtypes) <= {torch.float32}:
        return
    dtype = max(set(dtypes), key=dtypes.count)  # the one that the model around it computes in
    module.float()
    module.register_forward_pre_hook(lambda _, args, kwargs: _cast((args, kwargs), torch.float32), with_kwargs=True)
    module.register_forward_hook(lambda _, args, output: _cast(output, dtype))


def _cast(value, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _cast(item, dtype) for key, item in value.items()})
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_cast(item, dtype) for item in value)
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    return value
