"""What can be told of a model by its looks, before it is run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_cli.data.batches import Layout
from lora_cli.fusion.multiplying import dtype_of
from lora_cli.ops.cross_entropy import Head
from lora_cli.ops.products import onednn_multiplies

LEAST_SHARED = 64  # tokens that a shared prefix must spare to be worth its bookkeeping


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


def heads_of(model: PreTrainedModel, output: nn.Linear) -> Iterator[Head]:
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
    return frozenset(inspect.signature(model.base_model.forward).parameters)


def first_positions(model: PreTrainedModel) -> list[int]:
    """Where positions begin: at 0, or behind the pad id, as RoBERTa's do."""
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" in name]
    padded = [m.padding_idx + 1 for m in tables if m.padding_idx is not None]
    return [*padded, 0]
