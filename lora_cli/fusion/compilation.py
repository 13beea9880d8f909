"""Compiling a model's layers as they are, where it has no fused forms whose work could be compiled alone."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lora_cli.adapters.quantized import QuantizedLinear
from lora_cli.data.batches import PADDED
from lora_cli.errors import UsageError
from lora_cli.fusion.dropping import restore_dropout
from lora_cli.fusion.ending import last_layer, lengthen
from lora_cli.fusion.layers import repeated_layers
from lora_cli.fusion.network import Network
from lora_cli.fusion.offloading import recompute_from_host


def compile_layers(network: Network) -> Network:
    """Compile layer by layer: one compilation serves all layers, and a classifier's own pooling is unaffected.

    Raises ``UsageError`` for a quantized base and for inputs that wait on the host: each unpacking, and each copy,
    would cut a compiled layer apart.

    Rows lie side by side then: the lengths of rows that lie end to end would make every batch a new program.
    """
    model = network.model
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UsageError(
            "training.torch_compile cannot work here: this model has no fused forms, and whole layers that unpack "
            "their weights cannot be compiled",
            "remove it, or model.quantization",
        )
    layers: list[nn.Module] = list(repeated_layers(model).values())
    if any(getattr(layer, "_gradient_checkpointing_func", None) is recompute_from_host for layer in layers):
        raise UsageError(
            "training.torch_compile cannot work here: this model has no fused forms, and whole layers whose inputs "
            "wait on the host cannot be compiled",
            "remove it, or use training.gradient_checkpointing: true or selective",
        )
    if network.end_to_end:
        model.set_attn_implementation(network.own_attention)
    last = last_layer(model)
    if last is not None and network.layout.looks_at is not None:
        lengthen(last)
    restore_dropout(model)
    for module in layers or [model]:
        module.compile(dynamic=True)
    return replace(
        network, layout=PADDED, first_position=0, notes=(*network.notes, "rows are padded: layers are compiled")
    )
