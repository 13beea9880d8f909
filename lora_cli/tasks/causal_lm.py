"""Next-token prediction on supervised positions.

Shape suffixes: B rows, T tokens, K kept positions, N supervised positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.data.batches import IGNORE_INDEX, Batch
from lora_cli.ops.cross_entropy import summed_cross_entropy
from lora_cli.tasks.task import Metrics, Sums


class CausalLM:
    higher_is_better: ClassVar[frozenset[str]] = frozenset({"token_accuracy", "exact_match"})

    @staticmethod
    def loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
        logits_NV, targets_N, _ = supervised_logits(model, batch)
        return summed_cross_entropy(logits_NV, targets_N)

    @staticmethod
    def sums(model: PreTrainedModel, batch: Batch) -> Sums:
        logits_NV, targets_N, rows_N = supervised_logits(model, batch)
        wrong_N = logits_NV.argmax(-1) != targets_N
        wrong_rows_B = torch.zeros(len(batch.where), device=targets_N.device).index_add_(0, rows_N, wrong_N.float())
        return {
            "loss": summed_cross_entropy(logits_NV, targets_N).cpu().double(),  # not every device has float64
            "targets": torch.tensor(len(targets_N)),
            "correct": (~wrong_N).sum(),
            "rows": torch.tensor(len(batch.where)),
            "exact": (wrong_rows_B == 0).sum(),
        }

    @staticmethod
    def figures(sums: Sums) -> Metrics:
        loss = float(sums["loss"]) / int(sums["targets"])
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # exp overflows a float beyond
            "token_accuracy": int(sums["correct"]) / int(sums["targets"]),
            "exact_match": int(sums["exact"]) / int(sums["rows"]),
        }


def supervised_logits(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(logits (N, V), targets (N,), row of each (N,)): the head runs only where some row has a target.

    The target at position t is predicted at t - 1.
    """
    targets_BT = batch.labels[:, 1:]
    kept_K = (targets_BT != IGNORE_INDEX).any(0).nonzero().squeeze(1)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if takes_positions(model):
        logits_BKV = model(**inputs, logits_to_keep=kept_K).logits
    else:
        logits_BKV = model(**inputs).logits[:, kept_K]
    targets_BK = targets_BT[:, kept_K]
    rows_N, columns_N = (targets_BK != IGNORE_INDEX).nonzero(as_tuple=True)
    return logits_BKV[rows_N, columns_N], targets_BK[rows_N, columns_N], rows_N


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model's head can be run on chosen positions."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
