"""A model's dropout modules, drawn the faster way on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapters.layer import has_hooks
from lora_cli.ops.dropout import dropout


def quicken_dropout(model: nn.Module) -> None:
    """Nothing to prove: what falls is drawn anew each time, and as often."""
    for module in _dropouts(model):
        if not has_hooks(module):
            vars(module)["forward"] = partial(_drop, module)  # as a form is adopted; undone below


def restore_dropout(model: nn.Module) -> None:
    """Give the modules their own code back."""
    for module in _dropouts(model):
        vars(module).pop("forward", None)


def _dropouts(model: nn.Module) -> Iterator[nn.Dropout]:
    return (module for module in model.modules() if type(module) is nn.Dropout and not module.inplace)


def _drop(module: nn.Dropout, x: Tensor) -> Tensor:
    """On paper as here: torch's own kernels on other devices keep a byte a number as well."""
    if not module.training or module.p == 0 or x.device.type not in ("cpu", "meta"):
        return F.dropout(x, module.p, module.training)
    return dropout(x, module.p)
