"""Element-wise formulas as single kernels, where a compiler can make them.

Shape suffixes: N any number of values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from lora_cli.errors import first_line


@cache
def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(formula, dynamic=True)


def kernel(formula: Callable[..., Any], compile: bool) -> Callable[..., Any]:
    """The formula as it stands, or compiled once for tensors of any size."""
    return _compiled(formula) if compile else formula


def why_not_compiled(device: torch.device) -> str | None:
    """The reason why nothing can be compiled for this device, in one line; None where it works, as a trial shows."""
    try:
        values_N = torch.zeros(2, device=device)
        return None if bool((torch.compile(_trial)(values_N) == 1).all()) else "the compiled trial gave a wrong result"
    except Exception as error:  # no compiler, no headers, a broken one: each with exceptions of its own
        return first_line(error)


def _trial(values_N: torch.Tensor) -> torch.Tensor:
    return values_N.cos() + values_N
