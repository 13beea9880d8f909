"""The repeated layers of a model: what is recomputed, compiled or skipped as one; and what lies below them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
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


def layer_list(model: PreTrainedModel) -> nn.ModuleList | None:
    """The list that the base runs through from the first layer to the last; None where there is not just one."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    outermost = {id(layer) for layer in repeated_layers(model).values()}
    found = [layers for layers in lists if any(id(layer) in outermost for layer in layers)]
    return found[0] if len(found) == 1 and {id(layer) for layer in found[0]} == outermost else None


def modules_below(model: PreTrainedModel, layers: nn.ModuleList, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """The base's modules ahead of layer ``depth``, by name; modules are built in the order in which they run.

    What is built ahead of its time counts as below too (OPT's last norm): refusing it errs on the safe side.
    """
    above = {id(module) for layer in list(layers)[depth:] for module in layer.modules()}
    inside = {id(module) for layer in layers for module in layer.modules()}
    passed_layers = False
    for name, module in model.base_model.named_modules(prefix=model.base_model_prefix):
        passed_layers |= id(module) in inside
        if id(module) in above or (passed_layers and id(module) not in inside):
            return
        yield name, module


def lowest_trained(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[int, str]:
    """How many layers lie below everything that is trained, and the name of what is trained first."""
    for name, module in modules_below(model, layers, 0):
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            return 0, name
    for number, layer in enumerate(layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return number, f"layer {number}"
    return len(layers), "the head"


def chance_below(model: PreTrainedModel, layers: nn.ModuleList, depth: int) -> str | None:
    """What makes the states that enter layer ``depth`` random while training, if something does."""
    for name, module in modules_below(model, layers, depth):
        dropout = {"p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else {}
        named = {key: value for key, value in vars(module).items() if "drop" in key or "jitter" in key}
        for key, value in (dropout | named).items():
            if isinstance(value, float) and value > 0:
                return f"{name}.{key} = {value:g}"
    return None
