"""Which way a model may be run, found out on the model itself before the first step.

A few short rows are run one by one through the model's own code, and then every faster way: end to end
without padding, with fused forms, with the head as a formula. What does not give the same is not used, and a
note says so. Where kernels come from a compiler or a device's library, a backward pass is run as well.

Shape suffixes: N tokens, D hidden size, M positions, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters.layer import has_hooks, projection_of
from lora_cli.adapters.tokens import parts_of
from lora_cli.data.batches import Batch, Layout, collate
from lora_cli.data.encoding import Example
from lora_cli.errors import UsageError, first_line
from lora_cli.fusion.attention import ROWS
from lora_cli.fusion.compilation import compile_layers
from lora_cli.fusion.dropping import quicken_dropout
from lora_cli.fusion.ending import last_layer, lengthen, shorten
from lora_cli.fusion.forms import Calls, Forward, abandon, adopt, close
from lora_cli.fusion.multiplying import choose_products_for, dtype_of
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
from lora_cli.ops.cross_entropy import Head, loss_and_gradient
from lora_cli.ops.kernels import why_not_compiled
from lora_cli.ops.products import onednn_multiplies
from lora_cli.ops.rows import Rows

LEAST_SHARED = 64  # tokens that a shared prefix must spare to be worth its bookkeeping
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


class _Prover:
    def __init__(self, model: PreTrainedModel, task: str, compile: bool, *, end_to_end: bool, fused: bool) -> None:
        self.model, self.task = model, task
        self.end_to_end, self.fused = end_to_end, fused
        self.device = next(model.parameters()).device
        self.compile = compile or self.device.type == "cuda"
        self.tries_backward = self.compile and not is_cut_up(model)  # pieces are gathered for whole steps only
        self.examples = probe_examples(model, task)
        self.proven: dict[nn.Module, Forward] = {}
        self.notes: list[str] = []

    def network(self) -> Network:
        plain = Network(self.model, own_attention=str(self.model.config._attn_implementation))
        expected = [self._answer(plain, [example]) for example in self.examples]
        network = self._learning(plain, expected) if self.tries_backward else self._proven(plain, expected)
        if self.fused:
            network = replace(network, head=self._head(network))
            quicken_dropout(self.model)
        network = self._ending(network)
        return replace(network, notes=tuple(self.notes))

    def _proven(self, plain: Network, expected: list[Tensor]) -> Network:
        network, sights = self._end_to_end(plain, expected) if self.end_to_end else (plain, {})
        return replace(network, forms=self._adopt_forms(network, sights)) if self.fused else network

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
            for first in _first_positions(self.model):
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
        if self.compile and (reason := why_not_compiled(self.device)):
            self.notes.append(f"element-wise work is not compiled: {reason}")
            self.compile = False
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
        wanted = torch.cat([embedding_gradient(plain, self._batch(plain, [one]), self.task) for one in self.examples])
        before: list[str] = []
        while True:
            network = self._proven(plain, expected)
            reason = self._why_not_backward(network, wanted)
            if reason is None or not (network.end_to_end or network.forms):
                self.notes += before
                return network
            before.append(self._step_back(plain, reason))

    def _why_not_backward(self, network: Network, wanted: Tensor) -> str | None:
        try:
            found = embedding_gradient(network, self._batch(network, self.examples), self.task)
        except Exception as error:  # whatever a compiler or a device's library raises
            return first_line(error)
        return None if close(found, wanted, GRADIENT_TOLERANCE) else "it gives another gradient"

    def _step_back(self, plain: Network, reason: str) -> str:
        """Undo what was proven, and switch the first way off that may be to blame; a note of it."""
        abandon(self.proven)
        self.model.set_attn_implementation(plain.own_attention)
        self.notes, self.proven = [], {}
        if self.compile:
            self.compile = False
            return f"element-wise work is not compiled: the backward pass fails: {reason}"
        if self.end_to_end:
            self.end_to_end = False
            return f"rows are padded: the backward pass of rows laid end to end fails: {reason}"
        self.fused = False
        return f"fused forms are not used: their backward pass fails: {reason}"

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
        for plain in _heads(self.model, table):
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
        right = close(found, expected, tolerance) and close(gradients[1], gradients[0], tolerance)
        return compiled if right else head

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
        if close(found, expected, TOLERANCES[found.dtype] / 10):
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


def why_not_end_to_end(model: PreTrainedModel) -> str | None:
    """What can be told without running it."""
    if "position_ids" not in _parameters(model):
        return "this architecture takes no position ids"
    if getattr(model.config, "attention_chunk_size", None):
        return "this architecture attends in chunks"
    return None


def layout_of(model: PreTrainedModel, device: torch.device) -> Layout:
    """Rows end to end; filled up where oneDNN multiplies.

    It keeps a kernel for every size that it meets, and with some processors' bfloat16 loses up to a third of its speed
    at sizes that are not round.
    """
    dtype = dtype_of(model)
    made_to_size = device.type == "cpu" and (
        dtype == torch.bfloat16 or (dtype == torch.float32 and onednn_multiplies())
    )
    return Layout(end_to_end=True, multiple=48 if made_to_size else 1)


def _heads(model: PreTrainedModel, output: nn.Linear) -> Iterator[Head]:
    config = model.config
    cap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    if getattr(config, "logit_scale", None):
        scales.insert(0, float(config.logit_scale))
    if getattr(config, "logits_scaling", None):
        scales.insert(0, 1 / float(config.logits_scaling))
    for scale in scales:
        yield Head(output.weight, output.bias, scale, float(cap) if cap else None)


def has_dropout(model: PreTrainedModel) -> bool:
    """Whether a training pass draws random numbers."""
    rates = [m.p if isinstance(m, nn.Dropout) else getattr(m, "attention_dropout", 0.0) for m in model.modules()]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _parameters(model: PreTrainedModel) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(model.base_model.forward).parameters)


def _first_positions(model: PreTrainedModel) -> list[int]:
    """Where positions begin: at 0, or behind the pad id, as RoBERTa's do."""
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" in name]
    padded = [m.padding_idx + 1 for m in tables if m.padding_idx is not None]
    return [*padded, 0]
