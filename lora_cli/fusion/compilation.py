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


def why_not_whole_layers(*, packed: bool, on_host: bool) -> tuple[str, str] | None:
    """What cannot be compiled as whole layers, and the cure: each unpacking, and each copy, would cut one apart."""
    reason = "cannot be used: this model has no fused forms, and whole layers"
    if packed:
        return f"{reason} that unpack their weights cannot be compiled", "remove it, or quantize nothing"
    if on_host:
        cure = "remove it, or use training.gradient_checkpointing: true or selective"
        return f"{reason} whose inputs wait on the host cannot be compiled", cure
    return None


def compile_layers(network: Network) -> Network:
    """Compile layer by layer: one compilation serves all layers, and a classifier's own pooling is unaffected.

    Raises ``UsageError`` for what ``why_not_whole_layers`` says, where only the forms' trial could show it.

    Rows lie side by side then: the lengths of rows that lie end to end would make every batch a new program.
    """
    model = network.model
    layers: list[nn.Module] = list(repeated_layers(model).values())
    refusal = why_not_whole_layers(
        packed=any(isinstance(module, QuantizedLinear) for module in model.modules()),
        on_host=any(getattr(layer, "_gradient_checkpointing_func", None) is recompute_from_host for layer in layers),
    )
    if refusal is not None:
        raise UsageError(f"training.torch_compile {refusal[0]}", refusal[1])
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
