"""Which way a model may be run, found out on the model itself before the first step.

A few short rows are run one by one through the model's own code, and then every faster way: end to end
without padding, with fused forms, with the head as a formula. What does not give the same is not used, and a
note says so. Where kernels come from a compiler or a device's library, a backward pass is run as well.

Shape suffixes: N tokens, D hidden size, M positions, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.data.batches import Batch, collate
from lora_cli.data.encoding import Example
from lora_cli.errors import UsageError, first_line
from lora_cli.fusion.attention import ROWS
from lora_cli.fusion.compilation import compile_layers
from lora_cli.fusion.dropping import quicken_dropout
from lora_cli.fusion.ending import last_layer, lengthen, shorten
from lora_cli.fusion.forms import Calls, Forward, abandon, adopt, close, kernels_of, name_of
from lora_cli.fusion.heads import proven_head
from lora_cli.fusion.looks import LEAST_SHARED, first_positions, has_dropout, layout_of, why_not_end_to_end
from lora_cli.fusion.multiplying import choose_products_for
from lora_cli.fusion.network import Network, unpacked_for_head
from lora_cli.fusion.probing import (
    LENGTHS,
    TOLERANCES,
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
from lora_cli.ops.flexible_attention import reasons_against
from lora_cli.ops.kernels import Kernels, why_not_compiled
from lora_cli.ops.rows import Rows

GRADIENT_TOLERANCE = 0.5  # finds kernels that are wrong; roundings add up to a tenth and more through deep models


@dataclass(frozen=True)
class ObservedRows(Rows):
    """Rows that remember how each attention module looked at them."""

    sights: dict[Any, Any] = field(default_factory=dict)

    def observe(self, module: object, sight: object) -> None:
        self.sights[module] = sight


@torch.no_grad()
def build_network(
    model: PreTrainedModel,
    task: str,
    *,
    attention: str = "auto",
    fused: bool = True,
    kernels: Kernels = Kernels.PLAIN,
) -> Network:
    """The fastest way to run this model that is shown to be right. The model is on its device, adapters attached.

    ``attention`` other than auto is a person's choice of kernel: rows are then padded, as it expects. ``kernels`` are
    those of the fused forms' element-wise work: compiled ones are always tried on CUDA, and where Liger has none.
    """
    was_training = model.training
    choose_products_for(model, next(model.parameters()).device)
    if attention == "auto":
        heed_soft_cap(model)
    model.eval()
    try:
        return _Prover(model, task, kernels, end_to_end=attention == "auto", fused=fused).network()
    finally:
        model.train(was_training)


def build_compiled_network(
    model: PreTrainedModel, task: str, *, attention: str = "auto", kernels: Kernels = Kernels.COMPILED
) -> Network:
    """What `training.torch_compile` asks for: fused forms compiled, or whole layers of a model that has none.

    Raises ``UsageError`` where nothing can be compiled.
    """
    if reason := why_not_compiled(next(model.parameters()).device):
        raise UsageError(f"training.torch_compile cannot work here: {reason}", "remove it, or install a C++ compiler")
    network = build_network(model, task, attention=attention, kernels=kernels)
    return network if network.forms else compile_layers(network)


# what a way may lack of those that were tried before it
_LACKS = {
    Kernels.LIGER: "Liger's kernels are not used",
    Kernels.COMPILED: "element-wise work is not compiled",
    Kernels.PLAIN: "fused forms are not used",
}


def _served_otherwise(proven: dict[nn.Module, Forward], choices: Sequence[Kernels]) -> list[str]:
    """A note where some forms, or all, do without the kernels that are best."""
    best, found = choices[0], {kernels_of(form) for form in proven.values()}
    if found == {best} or not (proven or best is Kernels.LIGER):
        return []
    if not proven:
        return ["Liger's kernels serve none of this model's layers"]
    if best is Kernels.COMPILED:
        some = " in some forms" if best in found else ""
        return [f"{_LACKS[best]}{some}: compiled forms fail or give something else"]
    others = sorted({name_of(form) for form in proven.values() if kernels_of(form) is not best})
    return [f"Liger's kernels do not serve {' and '.join(others)}: they fail, give something else, or there are none"]


class _Way(NamedTuple):
    """How a model is run: by which kernels, the best first (none: no fused forms), and whether rows lie end to end."""

    choices: tuple[Kernels, ...]
    end_to_end: bool

    def lacks(self, other: _Way) -> str:
        lost = [_LACKS[kernels] for kernels in other.choices if kernels not in self.choices]
        return " and ".join([*lost, *(["rows are padded"] if other.end_to_end and not self.end_to_end else [])])


class _Prover:
    def __init__(self, model: PreTrainedModel, task: str, kernels: Kernels, *, end_to_end: bool, fused: bool) -> None:
        self.model, self.task, self.fused = model, task, fused
        self.device = next(model.parameters()).device
        on_cuda = self.device.type == "cuda"
        wanted = Kernels.COMPILED if on_cuda and kernels is Kernels.PLAIN else kernels
        best_first = (Kernels.LIGER, Kernels.COMPILED, Kernels.PLAIN)
        self.way = _Way(best_first[best_first.index(wanted) :] if fused else (), end_to_end)
        trains_inside = any(p.requires_grad for p in model.base_model.parameters())
        made_here = on_cuda or wanted is not Kernels.PLAIN  # flash attention is a device's library, too
        self.tries_backward = made_here and trains_inside and not is_cut_up(model)  # which gathers for whole steps
        self.learns = False  # whether a backward pass was tried, and works
        self.examples = probe_examples(model, task)
        self.proven: dict[nn.Module, Forward] = {}
        self.notes: list[str] = []

    def network(self) -> Network:
        """Every way proven in turn, each on top of those before; what was left out is in the notes."""
        plain = Network(self.model, own_attention=str(self.model.config._attn_implementation))
        expected = [self._answer(plain, [example]) for example in self.examples]
        lasting = []
        if Kernels.COMPILED in self.way.choices and (reason := why_not_compiled(self.device)):
            lasting.append(f"{_LACKS[Kernels.COMPILED]}: {reason}")
            others = tuple(kernels for kernels in self.way.choices if kernels is not Kernels.COMPILED)
            self.way = self.way._replace(choices=others)
        network = self._learning(plain, expected) if self.tries_backward else self._proven(plain, expected)
        if self.fused:
            network = self._with_head(network)
            quicken_dropout(self.model)
        network = self._ending(network)
        self.notes += [f"attention's soft caps or windows have no kernel of their own: {r}" for r in reasons_against()]
        return replace(network, notes=(*lasting, *self.notes))

    def _proven(self, plain: Network, expected: list[Tensor]) -> Network:
        network, sights = self._end_to_end(plain, expected) if self.way.end_to_end else (plain, {})
        return replace(network, forms=self._adopt_forms(network, sights)) if self.way.choices else network

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
        proven = calls.proven_forms(sights, self.way.choices)
        self.notes += _served_otherwise(proven, self.way.choices)
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
        for self.way in ways:
            network = self._proven(plain, expected)
            reason = self._why_not_backward(network, self.examples, wanted)
            if reason is None:
                self.learns = True
                break
            first_reason = first_reason or reason
            self._undo(plain)
        if first_reason is not None:
            self.notes.append(f"{self.way.lacks(ways[0])}: the backward pass fails: {first_reason}")
        return network

    def _ways(self) -> list[_Way]:
        """The fastest first; the last one is the model's own code."""
        choices, lines = self.way.choices, dict.fromkeys((self.way.end_to_end, False))
        fewer = [choices[number:] for number in range(len(choices))] or [()]
        ways = [_Way(those, end_to_end) for end_to_end in lines for those in fewer]
        return [*dict.fromkeys([*ways, _Way((), end_to_end=False)])]

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

    # 4. the head and the last layer

    def _with_head(self, network: Network) -> Network:
        if self.task != "causal_lm":
            return network
        choices = self.way.choices or (Kernels.PLAIN,)
        head, notes = proven_head(network, self._batch(network, self.examples), choices)
        self.notes += notes
        return replace(network, head=head)

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
        except Exception:  # as in _agrees
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
