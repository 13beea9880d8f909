"""How A begins; B begins at zero, so the adapted model begins as the base."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_cli.adapters.layer import LoRALinear
from lora_cli.seeds import stream


def kaiming_uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """U(-1/sqrt(I), 1/sqrt(I)): Kaiming-uniform with a = sqrt(5), as nn.Linear and PEFT begin.

    arXiv:1502.01852, eq. 14 with gain sqrt(2 / (1 + a^2)).
    """
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def gaussian(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """N(0, 1/R^2), as PEFT's ``gaussian``."""
    return torch.empty(shape).normal_(std=1 / shape[0], generator=generator)


INITIALISATIONS: dict[bool | str, Callable[[torch.Size, torch.Generator], Tensor]] = {
    True: kaiming_uniform,
    "gaussian": gaussian,
}


@torch.no_grad()
def initialise(layers: dict[str, LoRALinear], kind: bool | str, seed: int) -> None:
    """Fill every A from a stream named after its module: adding a module changes no other one."""
    for name, layer in layers.items():
        values = INITIALISATIONS[kind](layer.lora_A.shape, stream(seed, "init", name))
        layer.lora_A.copy_(values)
        layer.lora_B.zero_()
