"""Layers whose inputs wait in the host's memory until the backward pass computes them again.

Copies run beside the computation, on a stream of their own: out while the layer runs, and back while the layer above
is computed again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Arrival = Callable[[], Tensor]  # waits for a tensor that is on its way


class Lane(Protocol):
    """The way between a device and the host's memory."""

    def out(self, tensor: Tensor) -> Tensor:
        """Its copy on the host. The tensor's own memory is free when nothing else needs it and the copy is done."""
        ...

    def back(self, host: Tensor) -> Arrival:
        """Begin to copy it to the device."""
        ...


class CudaLane:
    """Through pinned memory, without keeping either side waiting."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.copies = device, torch.cuda.Stream(device)

    def out(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.copies)  # its memory is not given to others before the copy is done
        return host

    def back(self, host: Tensor) -> Arrival:
        with torch.cuda.stream(self.copies):  # behind its way out, on the same stream
            tensor = host.to(self.device, non_blocking=True)
        done = self.copies.record_event()

        def arrived() -> Tensor:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(done)
            tensor.record_stream(current)
            return tensor

        return arrived


class PaperLane:
    """Of shapes: the host's side weighs nothing."""

    def out(self, tensor: Tensor) -> Tensor:
        return torch.empty((), dtype=tensor.dtype).expand(tensor.shape)

    def back(self, host: Tensor) -> Arrival:
        tensor = torch.empty(host.shape, dtype=host.dtype, device="meta")
        return lambda: tensor


@cache
def lane_of(device: torch.device) -> Lane:
    return PaperLane() if device.type == "meta" else CudaLane(device)


class Stowed:
    """One layer's input. When it is fetched, that of the layer below is sent for: it arrives meanwhile."""

    def __init__(self, tensor: Tensor, below: Stowed | None) -> None:
        self._lane = lane_of(tensor.device)
        self._host: Tensor | None = self._lane.out(tensor)
        self._arrival: Arrival | None = None
        self._below = weakref.ref(below) if below is not None else lambda: None

    def send_for(self) -> None:
        """Once; of a forward pass that is long over, nothing."""
        if self._arrival is None and self._host is not None:
            self._arrival = self._lane.back(self._host)

    def fetch(self) -> Tensor:
        """Once: what arrives is not kept."""
        self.send_for()
        below, arrival = self._below(), self._arrival
        if below is not None:
            below.send_for()
        assert arrival is not None
        self._host = self._arrival = None
        return arrival()


_newest: weakref.WeakValueDictionary[torch.device, Stowed] = weakref.WeakValueDictionary()


def stow(tensor: Tensor) -> Stowed:
    """Layers stow in the order in which they run, and fetch in the opposite one."""
    stowed = Stowed(tensor, _newest.get(tensor.device))
    _newest[tensor.device] = stowed
    return stowed


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
        ctx.stowed = stow(leaves[hidden])
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
                tensor = ctx.stowed.fetch() if i == ctx.hidden else next(kept)
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
