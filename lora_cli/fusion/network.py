"""A model and how it is run: padded or end to end, through its own head or with the head folded into the loss.

Shape suffixes: B rows, T tokens of the longest, N tokens of all, M supervised positions, V vocabulary, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.data.batches import PADDED, Batch, Layout
from lora_cli.fusion.attention import ROWS_KEYWORD
from lora_cli.fusion.frozen import FrozenLayers
from lora_cli.ops.cross_entropy import Head
from lora_cli.ops.rows import Ending, pad_rows
from lora_cli.ops.sending import send


@dataclass(frozen=True)
class Network:
    """Every forward pass of training and evaluation goes through here."""

    model: PreTrainedModel
    layout: Layout = PADDED  # end to end where the model was shown to keep such rows apart
    first_position: int = 0  # RoBERTa counts from 2
    own_attention: str = "sdpa"  # the attention that the model would use by itself
    head: Head | None = None  # the output head as a formula, where it was shown to be one
    sharded: bool = False  # its layers lie in pieces, and a forward pass is one of all processes together
    forms: dict[str, int] = field(default_factory=dict)  # fused forms by kind, where modules were shown to have them
    frozen: FrozenLayers | None = None  # layers that are run once a row
    notes: tuple[str, ...] = ()  # why something slower is used

    @property
    def end_to_end(self) -> bool:
        return self.layout.end_to_end

    def _run(self, module: nn.Module, batch: Batch, *, to_the_end: bool = True, **more: Any) -> Any:
        """The model or its base on a batch; frozen layers only where a row is new to them.

        Not ``to_the_end``, only the batch's ending leaves the last layer.
        """
        inputs = self.inputs(batch)
        if not to_the_end:
            inputs[ROWS_KEYWORD] = replace(batch.rows, ending=batch.ending)
        if self.frozen is None:
            return module(**inputs, **more)
        with self.frozen.skipped(batch, self.base_output):
            return module(**inputs, **more)

    def base_output(self, batch: Batch) -> Any:
        """What the base gives, all of its layers run."""
        return self.model.base_model(**self.inputs(batch))

    def hidden(self, batch: Batch) -> Tensor:
        """The base's last hidden states, (B, T, D) or (1, N, D)."""
        return self._run(self.model.base_model, batch).last_hidden_state

    def supervised_hidden(self, batch: Batch) -> Tensor:
        """(M, D): the states that the targets are predicted from."""
        if batch.ending is not None:
            return self._looked_at(batch, batch.ending)
        return self.hidden(batch).flatten(0, 1).index_select(0, batch.places)

    def _looked_at(self, batch: Batch, ending: Ending) -> Tensor:
        hidden = self._run(self.model.base_model, batch, to_the_end=False).last_hidden_state[0]
        if len(hidden) == batch.rows.num_tokens:  # the last layer was skipped: OPT drops layers at random
            return hidden.index_select(0, ending.places.index_select(0, ending.wanted))
        return hidden.index_select(0, ending.wanted)

    def supervised_logits(self, batch: Batch) -> Tensor:
        """(M, V) through the model's own head, which runs on no more positions than it must."""
        if not takes_positions(self.model):
            return self._run(self.model, batch).logits.flatten(0, 1).index_select(0, batch.places)
        if self.end_to_end:
            return self._run(self.model, batch, logits_to_keep=batch.places).logits[0]
        assert batch.columns is not None
        logits_BKV = self._run(self.model, batch, logits_to_keep=batch.columns.chosen).logits
        return logits_BKV[batch.target_rows, batch.columns.of_target]

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C). Decoders are read at each row's last token by position.

        Their own forward would look for the pad id instead, which fails where there is none and reads the
        wrong token where a text holds it.
        """
        if hasattr(self.model, "score"):
            return self.model.score(self._last_hidden(batch))
        if not self.end_to_end:
            return self._run(self.model, batch).logits
        with unpacked_for_head(self.model, batch):
            return self._run(self.model, batch, to_the_end=batch.ending is None).logits

    def _last_hidden(self, batch: Batch) -> Tensor:
        """(B, D): the states of each row's last token."""
        if batch.ending is not None:
            return self._looked_at(batch, batch.ending)
        hidden_ND = self.hidden(batch).flatten(0, 1)
        return hidden_ND.index_select(0, send(self._last_places(batch), hidden_ND.device))

    def _last_places(self, batch: Batch) -> Tensor:
        """(B,): where each row's last token is, counted through all of the batch."""
        lengths_B = torch.tensor(batch.rows.lengths[: batch.num_rows])
        if self.end_to_end:
            return lengths_B.cumsum(0) - 1
        return torch.arange(batch.num_rows) * batch.rows.longest + lengths_B - 1

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the base's forward is given."""
        device = batch.input_ids.device
        inputs: dict[str, Any] = {"input_ids": batch.input_ids}
        if self.end_to_end:
            positions_N = batch.rows.positions() + self.first_position
            inputs |= {"position_ids": send(positions_N[None], device), ROWS_KEYWORD: batch.rows}
        else:
            inputs["attention_mask"] = send(batch.attention_mask(), device)
        return inputs | extra_inputs(self.model, batch.input_ids)


def extra_inputs(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Any]:
    """No cache where there could be one, and the first token type where a model embeds types.

    GPT-2 takes types too, and would look them up among its words.
    """
    known = inspect.signature(model.base_model.forward).parameters
    extra: dict[str, Any] = {"use_cache": False} if "use_cache" in known else {}
    if "token_type_ids" in known and getattr(model.config, "type_vocab_size", None):
        extra["token_type_ids"] = torch.zeros_like(input_ids)
    return extra


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model's head can be run on chosen positions."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@contextmanager
def unpacked_for_head(model: PreTrainedModel, batch: Batch, *, only_first: bool = False) -> Iterator[None]:
    """While it lasts, what leaves the encoder is side by side again: heads look rows up by their numbers.

    With ``only_first`` nothing but the first token of each row is to be seen.
    """

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output["last_hidden_state"][0]
        rows = batch.rows if batch.ending is None or len(hidden) == batch.rows.num_tokens else batch.ending.rows
        output["last_hidden_state"] = pad_rows(hidden, rows, batch.num_rows)
        if only_first:
            output["last_hidden_state"][:, 1:] = 0
        return output

    encoder = getattr(model.base_model, "encoder", model.base_model)  # ahead of the base's own pooler, if it has one
    handle = encoder.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
