"""The layers below everything that is trained, run once a row.

Nothing in them changes, so neither does what they give: the states that enter the first layer with something
trained. They are computed on a row's first visit and kept; from then on stand-ins take the layers' places.

Rows are computed in groups that depend on the data set alone, never on the batch that asked: so a resumed
run, which asks in another order, finds the same bytes.

Shape suffixes: B rows, T tokens of the longest, N tokens of all, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_cli.data.batches import Batch, Layout, collate
from lora_cli.data.encoding import Example
from lora_cli.fusion.states import States, key_of

Run = Callable[[Batch], Any]  # the base on a batch


class _Arrived(Exception):
    """Carries the states out of a forward pass, of which nothing more is needed."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("left a forward pass early")
        self.hidden = hidden


class _StandIn(nn.Module):
    """In a layer's place; what else is asked of it, the layer answers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["layer"], name)


class _Running(_StandIn):
    """Runs its layer, and notes whether that gives a tensor or a tuple. The last one ends the pass."""

    def __init__(self, layer: nn.Module, *, last: bool) -> None:
        super().__init__(layer)
        self.last = last
        self.length: int | None = None  # of the tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        self.length = len(output) if isinstance(output, tuple) else None
        if self.last:
            raise _Arrived(output if self.length is None else output[0])
        return output


class _Skipping(_StandIn):
    """Hands on what it gets, or what it holds instead, in the form in which its layer would."""

    def __init__(self, running: _Running) -> None:
        super().__init__(running.layer)
        self.running = [running]  # in a list: it is no part of this one
        self.instead: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden, length = hidden if self.instead is None else self.instead, self.running[0].length
        return hidden if length is None else (hidden, *[None] * (length - 1))


class FrozenLayers:
    """The first ``depth`` of a base's layers, and the states that they gave."""

    def __init__(
        self,
        layers: nn.ModuleList,
        depth: int,
        states: States,
        groups: list[list[Example]],
        layout: Layout,
        pad_id: int,
    ) -> None:
        self.layers, self.depth, self.states, self.layout, self.pad_id = layers, depth, states, layout, pad_id
        self._group_of = {key_of(example): group for group in groups for example in group}
        self._running = [_Running(layer, last=n == depth - 1) for n, layer in enumerate(list(layers)[:depth])]
        self._skipping = [_Skipping(running) for running in self._running]

    @contextmanager
    def skipped(self, batch: Batch, run: Run) -> Iterator[None]:
        """While it lasts, the base begins with the layer behind these, on this batch's states."""
        device = batch.input_ids.device
        for example in batch.examples:
            if key_of(example) not in self.states:
                self._compute(self._group_of.get(key_of(example), [example]), device, run)
        last = self._skipping[-1]
        last.instead = self._gathered(batch).to(device, non_blocking=True)
        try:
            with self._replaced(self._skipping):
                yield
        finally:
            last.instead = None

    def arriving(self, batch: Batch, run: Run) -> Tensor:
        """The states that leave these layers, (B, T, D) or (1, N, D); nothing above is run."""
        with self._replaced(self._running):
            try:
                run(batch)
            except _Arrived as arrived:
                return arrived.hidden
        raise RuntimeError("the base does not run its layers one after the other")

    def _compute(self, group: list[Example], device: torch.device, run: Run) -> None:
        batch = collate(group, self.pad_id, self.layout).to(device)
        with torch.no_grad():
            hidden = self.arriving(batch, run).cpu()
        for example, states_TD in zip(group, rows_of(hidden, batch, self.layout), strict=True):
            if key_of(example) not in self.states:
                self.states.put(key_of(example), states_TD)

    def _gathered(self, batch: Batch) -> Tensor:
        """The batch's states on the host, laid out as the batch is; zeros where nothing looks."""
        rows = [self.states.get(key_of(example)) for example in batch.examples]
        if self.layout.end_to_end:
            filling = batch.rows.num_tokens - batch.num_tokens
            rows += [rows[0].new_zeros(filling, rows[0].shape[1])] if filling else []
        states = torch.cat(rows)[None] if self.layout.end_to_end else pad_sequence(rows, batch_first=True)
        return states.pin_memory() if batch.input_ids.is_cuda else states

    @contextmanager
    def _replaced(self, stand_ins: list[Any]) -> Iterator[None]:
        before = dict(self.layers._modules)
        self.layers._modules.update({str(number): stand_in for number, stand_in in enumerate(stand_ins)})
        try:
            yield
        finally:
            self.layers._modules.update(before)


def rows_of(hidden: Tensor, batch: Batch, layout: Layout) -> list[Tensor]:
    """Each row's own states, (T, D)."""
    lengths = batch.rows.lengths[: batch.num_rows]
    if layout.end_to_end:
        return list(hidden[0, : batch.num_tokens].split(lengths))
    return [row_TD[:length] for row_TD, length in zip(hidden, lengths, strict=True)]


def groups_of(examples: list[Example], size: int) -> list[list[Example]]:
    """Rows of similar length, each once: a function of the data set and the size of a micro-batch."""
    unlike = {key_of(example): example for example in examples}
    ordered = sorted(unlike.values(), key=lambda example: -len(example.input_ids))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
