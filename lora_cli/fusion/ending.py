"""The last layer, run only where something is looked at behind it.

Every token's keys and values are needed there, but queries, and all that comes after attention, only of the tokens
that a loss or a classifier reads. So the layer's own code is run twice: first on all tokens until its attention has
their keys and values, and then from the beginning on the few, whose attention is given those.

Shape suffixes: N tokens, E those of the ending, M keys, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_cli.fusion.attention import ROWS_KEYWORD
from lora_cli.fusion.layers import layer_list
from lora_cli.ops.rows import Rows, own_keys


def last_layer(model: PreTrainedModel) -> nn.Module | None:
    """The one that all others lead to; None where there is not just one way through the model."""
    layers = layer_list(model)
    return None if layers is None else layers[-1]


def shorten(layer: nn.Module) -> None:
    """Let this layer run no more tokens than ``Rows.ending`` says."""
    layer.forward = partial(_run, layer)


def lengthen(layer: nn.Module) -> None:
    """Undo it."""
    del layer.forward


# Up to transformers 5.17 a layer is recomputed around its forward, whatever that is; later ones do it inside.
_RECOMPUTED_AROUND = "__call__" in vars(GradientCheckpointingLayer)


def _run(layer: Any, *args: Any, **kwargs: Any) -> Any:
    rows: Rows | None = kwargs.get(ROWS_KEYWORD)
    if rows is None or rows.ending is None:
        return type(layer).forward(layer, *args, **kwargs)
    if layer.training and layer.gradient_checkpointing and not _RECOMPUTED_AROUND:
        return layer._gradient_checkpointing_func(partial(_run_both, layer, **kwargs), *args)
    return _run_both(layer, *args, **kwargs)


def _run_both(layer: Any, *args: Any, **kwargs: Any) -> Any:
    rows: Rows = kwargs[ROWS_KEYWORD]
    ending = rows.ending
    assert ending is not None
    with _not_recomputed(layer):
        keys = _keys_of(layer, *args, **kwargs)
        few_args, few_kwargs = tree_map(partial(_few, rows.num_tokens, ending.places), (args, kwargs))
        few_kwargs[ROWS_KEYWORD] = replace(ending.rows, source=lambda *_: keys)
        return type(layer).forward(layer, *few_args, **few_kwargs)


@contextmanager
def _not_recomputed(layer: Any) -> Iterator[None]:
    """While it lasts, the layer's own code is what runs: both runs are recomputed together, or not at all."""
    before, layer.gradient_checkpointing = layer.gradient_checkpointing, False
    try:
        yield
    finally:
        layer.gradient_checkpointing = before


class _KeysArrived(Exception):
    """Carries keys and values out of a layer, of which nothing more is needed."""

    def __init__(self, key_MKD: Tensor, value_MKD: Tensor) -> None:
        super().__init__("left a layer early")
        self.keys = (key_MKD, value_MKD)


def _leave(rows: Rows, key_NKD: Tensor, value_NKD: Tensor) -> tuple[Tensor, Tensor]:
    raise _KeysArrived(*own_keys(rows, key_NKD, value_NKD))


def _keys_of(layer: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(M, K, D): the keys and values of this layer's attention."""
    kwargs[ROWS_KEYWORD] = replace(kwargs[ROWS_KEYWORD], source=_leave)
    try:
        type(layer).forward(layer, *args, **kwargs)
    except _KeysArrived as arrived:
        return arrived.keys
    raise RuntimeError("the last layer has no attention to its rows")


def _few(num_tokens: int, places_E: Tensor, leaf: Any) -> Any:
    """Of a tensor that has something for every token, (1, N, ...), what it has for those of the ending."""
    if isinstance(leaf, Tensor) and leaf.shape[:2] == (1, num_tokens):
        return leaf.index_select(1, places_E)
    return leaf
