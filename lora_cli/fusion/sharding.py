"""A frozen base in pieces: every process holds its part of each decoder layer, and gathers a layer to run it.

FSDP2 (``torch.distributed.fsdp.fully_shard``). What is trained stays whole in every process, in the
optimizer's vector; embeddings and the output head stay whole too, because the loss reads the head's weight
outside of any layer, and many models tie the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from lora_cli.fusion.layers import repeated_layers


def shard_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Cut the frozen weights of the decoder layers up, in place; their parts are on the device afterwards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # What the base gives is only ever read, so that it may be a view does no harm.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in repeated_layers(model).values():
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    # A root without weights of its own: under it, the next layer is gathered while one computes.
    fully_shard(model.base_model, mesh=mesh, ignored_params=set(model.parameters()))


def is_cut_up(model: PreTrainedModel) -> bool:
    """Whether its layers lie in pieces."""
    return dist.is_available() and dist.is_initialized() and any(_sharded_layers(model))


@contextmanager
def gathered(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """While it lasts, the weights of the layer around this module are whole, if they lie in pieces at all."""
    layer = _sharded_around(model, module) if dist.is_available() and dist.is_initialized() else None
    if layer is None:
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def _sharded_around(model: nn.Module, module: nn.Module) -> Any:
    layers = _sharded_layers(model)
    return next((layer for layer in layers if any(module is inside for inside in layer.modules())), None)


def _sharded_layers(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [layer for layer in repeated_layers(model).values() if isinstance(layer, FSDPModule)]
