"""A network that holds shapes only: how a model would be run, told from its looks on the meta device.

``proof.py`` finds the way out with weights; here nothing can be compared, so what looks like a form is taken for
one. It is an estimate of the way, and exact in what every tensor of that way weighs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lora_cli.adapters.tokens import parts_of
from lora_cli.data.batches import Batch, Layout, collate
from lora_cli.data.encoding import Example
from lora_cli.fusion.attention import ROWS
from lora_cli.fusion.dropping import quicken_dropout
from lora_cli.fusion.ending import last_layer, lengthen, shorten
from lora_cli.fusion.forms import Calls, adopt, forms_of
from lora_cli.fusion.looks import LEAST_SHARED, has_dropout, layout_of, why_not_end_to_end
from lora_cli.fusion.multiplying import choose_products_for
from lora_cli.fusion.network import Network, takes_positions
from lora_cli.fusion.probing import looked_at, only_its_last, probe_examples
from lora_cli.ops.cross_entropy import Head
from lora_cli.ops.kernels import Kernels
from lora_cli.ops.rows import Ending, Rows, SomePiece

META = torch.device("meta")


@dataclass(frozen=True)
class OutlinedRows(Rows):
    """Rows without tokens, on their way through the attention of the device that they stand for.

    What is done piece by piece is done for the largest, which needs most.
    """

    sights: dict[Any, Any] = field(default_factory=dict)

    def observe(self, module: object, sight: object) -> None:
        self.sights[module] = sight

    def in_turn(self, pieces: list[SomePiece]) -> list[SomePiece]:
        return [max(pieces, key=lambda piece: piece.num_scores)]


@contextmanager
def on_paper(device: torch.device) -> Iterator[None]:
    """While it lasts, a model of shapes takes the ways it would take on ``device``."""
    with _NoValues(), _KernelsOf(device.type):
        yield


class _KernelsOf(TorchFunctionMode):
    """On meta torch's attention is plain mathematics that keeps every probability; on a device it is a kernel."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and (
            not kwargs.get("dropout_p") or self.device_type == "cuda"  # the CPU's kernel knows no dropout
        ):
            return _flash_outline(*args, **kwargs)
        return function(*args, **kwargs)


def _flash_outline(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Keeps queries, keys, values, the output, a sum for each query, and the mask as numbers."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


class _NoValues(TorchDispatchMode):
    """Answers 0 where a model asks for a value, which a meta tensor does not have: is any of this padding?"""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        return operation(*args, **(kwargs or {}))


def outline_batch(examples: list[Example], layout: Layout, stands_for: torch.device) -> Batch:
    """These rows as a batch of shapes."""
    batch = collate(examples, 0, layout)
    known = batch.rows
    rows = OutlinedRows.of(
        list(known.lengths), prefix=known.prefix, filled=known.filled, stands_for=stands_for.type
    ).to(META)
    return replace(
        batch,
        input_ids=batch.input_ids.to(META),
        rows=rows,
        ending=None if batch.ending is None else _outlined(batch.ending, rows, known),
        places=batch.places.to(META),
        targets=batch.targets.to(META),
        target_rows=batch.target_rows.to(META),
        columns=None if batch.columns is None else batch.columns.to(META),
        labels=None if batch.labels is None else batch.labels.to(META),
    )


def _outlined(ending: Ending, rows: OutlinedRows, known: Rows) -> Ending:
    starts = [here - there for here, there in zip(ending.rows.offsets, known.offsets, strict=True)]
    part = rows.part(starts, list(ending.rows.lengths)).to(META)
    return Ending(part, ending.places.to(META), ending.wanted.to(META))


@torch.no_grad()
def outline_network(
    model: PreTrainedModel, task: str, device: torch.device, *, attention: str = "auto", fused: bool = True
) -> Network:
    """How ``build_network`` would run this model on ``device``, judged by its looks. The model is on meta."""
    choose_products_for(model, device)
    network = Network(model)
    if attention == "auto" and why_not_end_to_end(model) is None:
        network = _end_to_end(network, task, device) or network
    if fused:
        _adopt_forms(network, task, device)
        network = replace(network, head=_head(model, task))
        quicken_dropout(model)
    return _ending(network, task, device)


def _ending(network: Network, task: str, device: torch.device) -> Network:
    """The network whose last layer runs only where something is looked at, if it runs at all."""
    layer = last_layer(network.model)
    averages = getattr(network.model.config, "classifier_pooling", None) == "mean"
    whole = network.head is None if task == "causal_lm" else averages
    if not network.end_to_end or layer is None or whole:
        return network
    looks_at = "targets" if task == "causal_lm" else "last" if hasattr(network.model, "score") else "first"
    ending = replace(network, layout=replace(network.layout, looks_at=looks_at))
    rows = [only_its_last(example) for example in probe_examples(network.model, task)]
    shorten(layer)
    try:
        with on_paper(device):
            looked_at(ending, outline_batch(rows, ending.layout, device), task)
    except Exception:  # as in _end_to_end
        lengthen(layer)
        return network
    return ending


def _end_to_end(network: Network, task: str, device: torch.device) -> Network | None:
    """The network without padding; None where the model's attention does not come to ask about rows."""
    share = LEAST_SHARED if task == "causal_lm" and not has_dropout(network.model) else 0
    line = replace(network, layout=replace(layout_of(network.model, device), share=share))
    before = network.model.config._attn_implementation
    try:
        network.model.set_attn_implementation(ROWS)
        if _probe(line, task, device).sights:
            return line
    except Exception:  # whatever a model raises without values; proof.py takes it for a no as well
        pass
    network.model.set_attn_implementation(before)
    return None


def _probe(network: Network, task: str, device: torch.device) -> OutlinedRows:
    batch = outline_batch(probe_examples(network.model, task), network.layout, device)
    assert isinstance(batch.rows, OutlinedRows)
    with on_paper(device):
        network.hidden(batch)
    return batch.rows


def _adopt_forms(network: Network, task: str, device: torch.device) -> None:
    calls = Calls(network.model)
    try:
        sights = _probe(network, task, device).sights
    finally:
        calls.end()
    adopt(
        {
            module: form
            for module, (args, kwargs, output) in calls.notes.items()
            for form in list(forms_of(module, sights, Kernels.PLAIN))[:1]
            if _gives_the_shape(form, args, kwargs, output)
        }
    )


def _gives_the_shape(form: Any, args: Any, kwargs: Any, output: Any) -> bool:
    try:
        found = form(*args, **kwargs)
    except (TypeError, KeyError, RuntimeError, AssertionError, IndexError):
        return False
    first, other = (value[0] if isinstance(value, tuple) else value for value in (output, found))
    return isinstance(first, Tensor) and first.shape == other.shape


def _head(model: PreTrainedModel, task: str) -> Head | None:
    table, ids_T, rows_TD = parts_of(model.get_output_embeddings())
    if task != "causal_lm" or type(table) is not nn.Linear or not takes_positions(model):
        return None
    return Head(table.weight, table.bias, ids_T=ids_T, rows_TD=rows_TD)
