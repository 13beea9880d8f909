"""Which library multiplies for a model, and in which type."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lora_cli.adapters.layer import DENSE_TYPES, LINEAR_TYPES, features
from lora_cli.ops.products import choose_products, products_as_before


def choose_products_for(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> bool:
    """By the sizes of its linear layers, packed ones as what they are unpacked to.

    ``dtype`` is that of the products, where the model is not in it yet. Whether oneDNN multiplies float32.
    """
    sizes = [math.prod(features(module)) for module in model.modules() if isinstance(module, LINEAR_TYPES)]
    return choose_products(sizes, dtype or dtype_of(model), device)


@contextmanager
def products_for(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """While it lasts, all that is computed for this model is multiplied by the library that is chosen for it."""
    with products_as_before():
        choose_products_for(model, device, dtype)
        yield


def dtype_of(model: nn.Module) -> torch.dtype:
    """What the model computes in: its own linear layers' type, not that of what is trained beside them."""
    dense = (module.weight.dtype for module in model.modules() if isinstance(module, DENSE_TYPES))
    return next(dense, next(model.parameters()).dtype)
