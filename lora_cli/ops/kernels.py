"""Element-wise formulas as they stand, or as single kernels: made by torch's compiler, or Liger's.

Shape suffixes: N any number of values.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import Any

import torch

from lora_cli.errors import first_line
from lora_cli.ops import liger


class Kernels(StrEnum):
    """What runs a formula."""

    PLAIN = "plain"  # torch's own operations, one after the other
    COMPILED = "compiled"
    LIGER = "liger"


RECOMPILATIONS = 64  # of one formula: for one and several rows, with and without gradients, of each rank and type


@cache
def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    limits: Any = torch._dynamo.config  # beyond which a formula runs as it stands, for flex attention a costly way
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILATIONS)
    return torch.compile(formula, dynamic=True)


def kernel(formula: Callable[..., Any], kernels: Kernels) -> Callable[..., Any]:
    """The formula as it stands, compiled once for tensors of any size, or what Liger has in its place."""
    if kernels is Kernels.LIGER:
        return liger.KERNELS[formula.__name__]
    return _compiled(formula) if kernels is Kernels.COMPILED else formula


@cache
def why_not_compiled(device: torch.device) -> str | None:
    """The reason why nothing can be compiled for this device, in one line; None where it works, as a trial shows."""
    try:
        values_N = torch.zeros(2, device=device)
        return None if bool((torch.compile(_trial)(values_N) == 1).all()) else "the compiled trial gave a wrong result"
    except Exception as error:  # no compiler, no headers, a broken one: each with exceptions of its own
        return first_line(error)


def _trial(values_N: torch.Tensor) -> torch.Tensor:
    return values_N.cos() + values_N
