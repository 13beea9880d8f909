"""Less memory for more time: layers keep their inputs only, and are computed again in the backward pass.

``offload`` also moves those inputs out of the device's memory while they wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from lora_cli.fusion.layers import repeated_layers

Fetch = Callable[[], Tensor]  # gives a tensor back that was stowed away


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


def stow(tensor: Tensor) -> Fetch:
    """Copy a tensor into pinned host memory, beside the computation; what comes back waits for its copy only."""
    device, copies = tensor.device, _copies(tensor.device)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copies.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(copies):
        host.copy_(tensor, non_blocking=True)
    tensor.record_stream(copies)  # its memory is not given to others before the copy is done
    done = copies.record_event()

    def fetch() -> Tensor:
        torch.cuda.current_stream(device).wait_event(done)
        return host.to(device, non_blocking=True)

    return fetch


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which copies run; one a device."""
    return torch.cuda.Stream(device)


def recompute_from_host(function: partial[Any], *args: Any) -> Any:
    """What ``torch.utils.checkpoint.checkpoint`` does, with the hidden states waiting on the host.

    ``function`` is a layer's forward with its keywords, as transformers hands it over: a function of the layer, or up
    to transformers 5.17 a method of it.
    """
    leaves, spec = tree_flatten((args, function.keywords))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    forward: Any = function.func
    itself = function.args
    layer = itself[0] if itself else forward.__self__
    learns = any(t.requires_grad for t in tensors) or any(p.requires_grad for p in layer.parameters())
    if not (learns and torch.is_grad_enabled()):
        return function(*args)

    def run(values: list[Any]) -> Any:  # holds on to no tensor
        positional, keywords = tree_unflatten(values, spec)
        return forward(*itself, *positional, **keywords)

    anchor = torch.empty(0, requires_grad=True)  # the first layer's input needs no gradient, yet it is to be called
    hidden = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return _Recomputed.apply(run, hidden, anchor, *leaves)


class Chance:
    """The random generators as they stand, so that dropout falls alike when a layer is computed again."""

    def __init__(self, devices: set[int]) -> None:
        self.host = torch.get_rng_state()
        self.on_devices = {device: torch.cuda.get_rng_state(device) for device in devices}

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(list(self.on_devices), device_type="cuda"):
            torch.set_rng_state(self.host)
            for device, state in self.on_devices.items():
                torch.cuda.set_rng_state(state, device)
            yield


class _Recomputed(torch.autograd.Function):
    """(run, which leaf is stowed, anchor, leaves) -> what ``run`` gives for the leaves.

    Of the leaves only the hidden states are moved away: masks and position tables are shared by all layers.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[[list[Any]], Any], hidden: int, anchor: Tensor, *leaves: Any) -> Any:
        ctx.run, ctx.hidden = run, hidden
        ctx.chance = Chance({leaf.get_device() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_cuda})
        ctx.fetch = stow(leaves[hidden])
        kept = [leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and i != hidden]
        ctx.save_for_backward(*kept)
        ctx.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.set_materialize_grads(False)
        return run(list(leaves))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        kept = iter(ctx.saved_tensors)
        leaves = list(ctx.leaves)
        needed = ctx.needs_input_grad[3:]
        for i, is_tensor in enumerate(ctx.is_tensor):
            if is_tensor:
                tensor = ctx.fetch() if i == ctx.hidden else next(kept)
                leaves[i] = tensor.detach().requires_grad_(needed[i])
        with torch.enable_grad(), ctx.chance.again():
            outputs = ctx.run(leaves)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs if isinstance(outputs, tuple) else (outputs,), gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return (None, None, None, *(leaf.grad if need else None for leaf, need in zip(leaves, needed, strict=True)))
