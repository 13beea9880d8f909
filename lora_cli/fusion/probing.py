"""The few rows that the ways to run a model are compared on, and what they are compared by.

Shape suffixes: N tokens, D hidden size, M positions, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.data.batches import Batch
from lora_cli.data.encoding import Example
from lora_cli.fusion.network import Network
from lora_cli.models import num_embeddings

LENGTHS = (5, 2, 7)
# How far a whole model may be off, relative to the size of its output: many roundings.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def probe_examples(model: PreTrainedModel, task: str) -> list[Example]:
    """A few rows of arbitrary tokens, none of them special."""
    special = {getattr(model.config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    usable = [i for i in range(min(num_embeddings(model), 1000)) if i not in special]
    chance = np.random.default_rng(0)
    label = 0 if task == "sequence_classification" else None
    return [
        Example(
            chance.choice(usable, length).astype(np.int32),
            (np.arange(length) > 0) & (label is None),
            "probe",
            label,
        )
        for length in LENGTHS
    ]


def with_prefix(examples: list[Example]) -> list[Example]:
    """The rows behind a beginning that they have in common."""
    begin = examples[-1].input_ids
    return [
        replace(
            example,
            input_ids=np.concatenate([begin, example.input_ids]),
            supervised=np.concatenate([np.zeros(len(begin), dtype=bool), example.supervised]),
        )
        for example in examples
    ]


def other_tokens(example: Example) -> Example:
    return replace(example, input_ids=example.input_ids[::-1].copy())


def answer_of(network: Network, batch: Batch, task: str) -> Tensor:
    return network.class_logits(batch) if task == "sequence_classification" else network.hidden(batch).flatten(0, 1)


def looked_at(network: Network, batch: Batch, task: str) -> Tensor:
    return network.class_logits(batch) if task == "sequence_classification" else network.supervised_hidden(batch)


def only_its_last(example: Example) -> Example:
    return replace(
        example, supervised=example.supervised & (np.arange(len(example.input_ids)) == len(example.input_ids) - 1)
    )


def embedding_gradient(network: Network, batch: Batch, task: str) -> Tensor:
    """(N, D): what comes back to the embeddings of the batch's tokens from an uneven sum of what is looked at."""
    leaves: list[Tensor] = []

    def begin_here(module: Any, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = network.model.get_input_embeddings().register_forward_hook(begin_here)
    try:
        with torch.enable_grad():
            found = looked_at(network, batch, task)
            weights_D = torch.linspace(-1, 1, found.shape[-1], device=found.device)  # alike in every row
            (gradient,) = torch.autograd.grad((found * weights_D).sum(), leaves)
    finally:
        handle.remove()
    return gradient[0, : batch.num_tokens] if network.end_to_end else gradient[batch.attention_mask().bool()]
