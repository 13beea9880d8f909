"""Less memory for more time: layers keep their inputs only, and are computed again in the backward pass.

``offload`` also moves those inputs out of the device's memory while they wait (``offloading.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from lora_cli.fusion.layers import repeated_layers
from lora_cli.fusion.offloading import recompute_from_host


def checkpoint_activations(model: PreTrainedModel, how: bool | str = True) -> None:
    """Recompute every layer (true), every second one (selective), or every one from the host's memory (offload).

    Non-reentrant where torch does it, so frozen inputs still give gradients.
    """
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.18 renamed it
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    if getattr(model, "_require_grads_hook", None) is not None:
        # transformers asks for the embeddings' gradient, as the reentrant way needs: it would pull the backward pass
        # through layers below everything that is trained
        model.disable_input_require_grads()
    layers = list(repeated_layers(model).values())
    if how == "selective":
        for layer in layers[1::2]:
            _keep_activations(layer)
    if how == "offload":
        for layer in layers:
            layer._gradient_checkpointing_func = recompute_from_host


def _keep_activations(layer: Any) -> None:
    for module in layer.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False


def refuses(model: PreTrainedModel, how: bool | str, device: torch.device) -> str | None:
    """Why this model cannot be recomputed so on this device."""
    kind = model.config.model_type
    if how is not False and not model.supports_gradient_checkpointing:
        return f"is not supported by {kind} models"
    if how in ("selective", "offload") and not repeated_layers(model):
        return f"can only be true or false for {kind} models, which recompute in a way of their own"
    if how == "offload" and device.type != "cuda":
        return (
            f"offload moves activations from a CUDA device's memory into the host's, and on {device.type} "
            "there is only one memory"
        )
    return None
