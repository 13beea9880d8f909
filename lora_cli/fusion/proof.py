"""Which way a model may be run, found out on the model itself before the first step.

A few short rows are run one by one through the model's own code, and then every faster way: end to end
without padding, with fused forms, with the head as a formula. What does not give the same is not used, and a
note says so. Where kernels come from a compiler or a device's library, a backward pass is run as well.

Shape suffixes: N tokens, D hidden size, M positions, V vocabulary, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters.layer import has_hooks, projection_of
from lora_cli.adapters.tokens import parts_of
from lora_cli.data.batches import Batch, collate
from lora_cli.data.encoding import Example
from lora_cli.errors import UsageError, first_line
from lora_cli.fusion.attention import ROWS
from lora_cli.fusion.compilation import compile_layers
from lora_cli.fusion.dropping import quicken_dropout
from lora_cli.fusion.ending import last_layer, lengthen, shorten
from lora_cli.fusion.forms import Calls, Forward, abandon, adopt, close
from lora_cli.fusion.looks import LEAST_SHARED, first_positions, has_dropout, heads_of, layout_of, why_not_end_to_end
from lora_cli.fusion.multiplying import choose_products_for
from lora_cli.fusion.network import Network, takes_positions, unpacked_for_head
from lora_cli.fusion.probing import (
    LENGTHS,
    answer_of,
    embedding_gradient,
    looked_at,
    only_its_last,
    other_tokens,
    probe_examples,
    with_prefix,
)
from lora_cli.fusion.sharding import is_cut_up
from lora_cli.models import heed_soft_cap
from lora_cli.ops.cross_entropy import Head, loss_and_gradient
from lora_cli.ops.kernels import why_not_compiled
from lora_cli.ops.rows import Rows

# How far a whole model may be off, relative to the size of its output: many roundings.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
GRADIENT_TOLERANCE = 0.5  # finds kernels that are wrong; roundings add up to a tenth and more through deep models


@dataclass(frozen=True)
class ObservedRows(Rows):
    """Rows that remember how each attention module looked at them."""

    sights: dict[Any, Any] = field(default_factory=dict)

    def observe(self, module: object, sight: object) -> None:
        self.sights[module] = sight


@torch.no_grad()
def build_network(
    model: PreTrainedModel, task: str, *, attention: str = "auto", fused: bool = True, compile: bool = False
) -> Network:
    """The fastest way to run this model that is shown to be right. The model is on its device, adapters attached.

    ``attention`` other than auto is a person's choice of kernel: rows are then padded, as it expects. ``compile``
    makes single kernels of the fused forms' element-wise work, as is always tried on CUDA.
    """
    was_training = model.training
    choose_products_for(model, next(model.parameters()).device)
    if attention == "auto":
        heed_soft_cap(model)
    model.eval()
    try:
        return _Prover(model, task, compile, end_to_end=attention == "auto", fused=fused).network()
    finally:
        model.train(was_training)


def build_compiled_network(model: PreTrainedModel, task: str, *, attention: str = "auto") -> Network:
    """What `training.torch_compile` asks for: fused forms compiled, or whole layers of a model that has none.

    Raises ``UsageError`` where nothing can be compiled.
    """
    if reason := why_not_compiled(next(model.parameters()).device):
        raise UsageError(f"training.torch_compile cannot work here: {reason}", "remove it, or install a C++ compiler")
    network = build_network(model, task, attention=attention, compile=True)
    return network if network.forms else compile_layers(network)


_LOST = ("element-wise work is not compiled", "rows are padded", "fused forms are not used")


class _Prover:
    def __init__(self, model: PreTrainedModel, task: str, compile: bool, *, end_to_end: bool, fused: bool) -> None:
        self.model, self.task = model, task
        self.end_to_end, self.fused = end_to_end, fused
        self.device = next(model.parameters()).device
        self.compile = compile or self.device.type == "cuda"
        trains_inside = any(p.requires_grad for p in model.base_model.parameters())
        self.tries_backward = self.compile and trains_inside and not is_cut_up(model)  # which gathers for whole steps
        self.learns = False  # whether a backward pass was tried, and works
        self.examples = probe_examples(model, task)
        self.forms_too = fused
        self.proven: dict[nn.Module, Forward] = {}
        self.notes: list[str] = []

    def network(self) -> Network:
        """Every way proven in turn, each on top of those before; what was left out is in the notes."""
        plain = Network(self.model, own_attention=str(self.model.config._attn_implementation))
        expected = [self._answer(plain, [example]) for example in self.examples]
        lasting = []
        if self.fused and self.compile and (reason := why_not_compiled(self.device)):
            lasting.append(f"element-wise work is not compiled: {reason}")
            self.compile = False
        network = self._learning(plain, expected) if self.tries_backward else self._proven(plain, expected)
        if self.fused:
            network = replace(network, head=self._head(network))
            quicken_dropout(self.model)
        network = self._ending(network)
        return replace(network, notes=(*lasting, *self.notes))

    def _proven(self, plain: Network, expected: list[Tensor]) -> Network:
        network, sights = self._end_to_end(plain, expected) if self.end_to_end else (plain, {})
        return replace(network, forms=self._adopt_forms(network, sights)) if self.forms_too else network

    def _batch(self, network: Network, examples: list[Example]) -> Batch:
        return collate(examples, 0, network.layout).to(self.device)

    def _answer(self, network: Network, examples: list[Example]) -> Tensor:
        """What training looks at: hidden states of every token, or the classes of every row."""
        batch = self._batch(network, examples)
        if self.task == "sequence_classification":
            return network.class_logits(batch)
        hidden = network.hidden(batch)
        return hidden[0, : batch.num_tokens] if network.end_to_end or len(examples) == 1 else hidden

    # 1. without padding

    def _end_to_end(self, plain: Network, expected: list[Tensor]) -> tuple[Network, dict[Any, Any]]:
        """The network that lays rows end to end, or ``plain`` and a note why not."""
        reason = why_not_end_to_end(self.model)
        if reason is None:
            for first in first_positions(self.model):
                network = replace(plain, layout=layout_of(self.model, self.device), first_position=first)
                sights = self._try_end_to_end(network, torch.cat(expected))
                if sights is not None:
                    return self._sharing(network), sights
            self.model.set_attn_implementation(plain.own_attention)
            reason = "this architecture does not keep rows apart that are laid end to end"
        self.notes.append(f"rows are padded: {reason}")
        return plain, {}

    def _try_end_to_end(self, network: Network, expected: Tensor) -> dict[Any, Any] | None:
        """How each attention looks at its rows, where the answer is the rows' own and one row cannot see another."""
        try:
            self.model.set_attn_implementation(ROWS)
            batch = self._batch(network, self.examples)
            rows = ObservedRows.of(list(batch.rows.lengths)).to(self.device)
            found = answer_of(network, replace(batch, rows=rows), self.task)[: len(expected)]
            disturbed = self._answer(network, [other_tokens(self.examples[0]), *self.examples[1:]])
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, NotImplementedError):
            return None
        own = 1 if self.task == "sequence_classification" else LENGTHS[0]
        tolerance = TOLERANCES[found.dtype]
        kept_apart = close(disturbed[own:], found[own:], tolerance / 10)
        noticed = not close(disturbed[:own], found[:own], tolerance / 10)
        return rows.sights if close(found, expected, tolerance) and kept_apart and noticed else None

    def _sharing(self, network: Network) -> Network:
        """The network that computes a prefix of all rows once, if that gives what the rows alone give."""
        if self.task != "causal_lm" or has_dropout(self.model):  # what is dropped is each row's own matter
            return network
        sharing = replace(network, layout=replace(network.layout, share=1))
        rows = with_prefix(self.examples)
        try:
            found = sharing.supervised_hidden(self._batch(sharing, rows))
        except (RuntimeError, ValueError, IndexError):
            return network
        expected = network.supervised_hidden(self._batch(network, rows))
        share = LEAST_SHARED if close(found, expected, TOLERANCES[found.dtype]) else 0
        return replace(network, layout=replace(network.layout, share=share))

    # 2. fused forms

    def _adopt_forms(self, network: Network, sights: dict[Any, Any]) -> dict[str, int]:
        """Put the forms in place that agree with their modules, if the whole model agrees too; how many of each."""
        calls = Calls(self.model)
        try:
            before = answer_of(network, self._batch(network, self.examples), self.task)
        finally:
            calls.end()
        proven = calls.proven_forms(sights, self.compile)
        if self.compile and len(uncompiled := calls.proven_forms(sights, False)) > len(proven):
            self.notes.append("element-wise work is not compiled: compiled forms fail or give something else")
            self.compile, proven = False, uncompiled
        forms = adopt(proven)
        after = answer_of(network, self._batch(network, self.examples), self.task)
        if close(after, before, TOLERANCES[before.dtype]):
            self.proven = proven
            return forms
        abandon(proven)
        self.notes.append("fused forms are not used: together they change what the model gives")
        return {}

    # 3. the backward pass

    def _learning(self, plain: Network, expected: list[Tensor]) -> Network:
        """The fastest network whose backward pass works as well; if none does, the model's own code."""
        try:
            each = [embedding_gradient(plain, self._batch(plain, [one]), self.task) for one in self.examples]
        except Exception as error:  # whatever a model raises whose embeddings are no beginning, or are written into
            network = self._proven(plain, expected)
            self.notes.append(f"the backward pass is not tried ahead of the first step: {first_line(error)}")
            return network
        wanted, first_reason, ways = torch.cat(each), None, self._ways()
        for way in ways:
            self.compile, self.end_to_end, self.forms_too = way
            network = self._proven(plain, expected)
            reason = self._why_not_backward(network, self.examples, wanted)
            if reason is None:
                self.learns = True
                break
            first_reason = first_reason or reason
            self._undo(plain)
        if first_reason is not None:
            lost = [what for what, had, has in zip(_LOST, ways[0], way, strict=True) if had and not has]
            self.notes.append(f"{' and '.join(lost)}: the backward pass fails: {first_reason}")
        return network

    def _ways(self) -> list[tuple[bool, bool, bool]]:
        """(compiled, end to end, with forms), the fastest first; the last one is the model's own code."""
        compile, end_to_end, fused = self.compile, self.end_to_end, self.fused
        ways = [
            (compile, end_to_end, fused),
            (False, end_to_end, fused),
            (compile, False, fused),
            (False, False, fused),
            (False, False, False),
        ]
        return [*dict.fromkeys(ways)]

    def _why_not_backward(self, network: Network, rows: list[Example], wanted: Tensor) -> str | None:
        try:
            found = embedding_gradient(network, self._batch(network, rows), self.task)
        except Exception as error:  # whatever a compiler or a device's library raises
            return first_line(error)
        return None if close(found, wanted, GRADIENT_TOLERANCE) else "it gives another gradient"

    def _undo(self, plain: Network) -> None:
        abandon(self.proven)
        self.model.set_attn_implementation(plain.own_attention)
        self.notes, self.proven = [], {}

    # 4. the head

    def _head(self, network: Network) -> Head | None:
        """The output head as a formula, where it gives the model's own logits."""
        output = self.model.get_output_embeddings()
        table, ids_T, rows_TD = parts_of(output)
        if self.task != "causal_lm" or type(table) is not nn.Linear or not takes_positions(self.model):
            return None
        if (projection_of(table) is None and not table.weight.requires_grad) or (
            table is not output and has_hooks(output)
        ):
            return None
        batch = self._batch(network, self.examples)
        hidden_MD = network.supervised_hidden(batch)
        expected_MV = network.supervised_logits(batch)
        for plain in heads_of(self.model, table):
            head = replace(plain, ids_T=ids_T, rows_TD=rows_TD)
            if close(head.logits(hidden_MD).to(expected_MV.dtype), expected_MV, TOLERANCES[expected_MV.dtype] / 10):
                return self._with_kernel(head, expected_MV, batch.targets)
        self.notes.append("the loss holds all logits at once: this architecture's head is not a plain one")
        return None

    def _with_kernel(self, head: Head, logits_MV: Tensor, targets_M: Tensor) -> Head:
        """The head with a compiled loss, where that gives the same."""
        if not self.compile:
            return head
        compiled = replace(head, compile=True)
        gradients = [logits_MV.clone(), logits_MV.clone()]
        expected = loss_and_gradient(gradients[0], targets_M, head)
        try:
            found = loss_and_gradient(gradients[1], targets_M, compiled)
        except Exception as error:  # as in _why_not_backward
            self.notes.append(f"the loss is not compiled: {first_line(error)}")
            return head
        tolerance = TOLERANCES[logits_MV.dtype] / 10
        if close(found, expected, tolerance) and close(gradients[1], gradients[0], tolerance):
            return compiled
        self.notes.append("the loss is not compiled: it gives something else")
        return head

    # 5. the last layer

    def _ending(self, network: Network) -> Network:
        """The network whose last layer runs only where something is looked at, if that gives the same there."""
        layer = last_layer(self.model) if network.end_to_end else None
        looks_at = self._looks_at(network) if layer is not None else None
        if layer is None or looks_at is None:
            return network
        ending = replace(network, layout=replace(network.layout, looks_at=looks_at))
        rows = [only_its_last(example) for example in self.examples]
        expected = looked_at(network, self._batch(network, rows), self.task)
        shorten(layer)
        try:
            found = looked_at(ending, self._batch(ending, rows), self.task)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError):
            found = torch.zeros_like(expected)
        right = close(found, expected, TOLERANCES[found.dtype] / 10)
        if right and self.learns:
            wanted = embedding_gradient(network, self._batch(network, rows), self.task)
            right = self._why_not_backward(ending, rows, wanted) is None
        if right:
            return ending
        lengthen(layer)
        return network

    def _looks_at(self, network: Network) -> str | None:
        """Decoders are read at their last token by ``Network``; encoders by their own head, which is asked."""
        if self.task == "causal_lm":
            return None if network.head is None else "targets"  # a head of its own runs on what it chooses
        if hasattr(self.model, "score"):
            return "last"
        batch = self._batch(network, self.examples)
        with unpacked_for_head(self.model, batch, only_first=True):
            blindfolded = network.model(**network.inputs(batch)).logits
        return "first" if torch.equal(blindfolded, network.class_logits(batch)) else None
