"""The repeated layers of a model: what is recomputed, compiled or skipped as one."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def repeated_layers(model: nn.Module) -> dict[str, GradientCheckpointingLayer]:
    """Every layer that can be recomputed, by name and in order; a layer inside another one is part of that."""
    found: dict[str, GradientCheckpointingLayer] = {}
    outer = "-"
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not name.startswith(f"{outer}."):
            found[name] = module
            outer = name
    return found
