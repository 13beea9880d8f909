"""One label a row.

Shape suffixes: B rows, T tokens, D hidden size, C classes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.data.batches import Batch
from lora_cli.ops.cross_entropy import summed_cross_entropy
from lora_cli.tasks.task import Metrics, Sums


class SequenceClassification:
    higher_is_better: ClassVar[frozenset[str]] = frozenset({"accuracy", "macro_f1", "matthews_correlation"})

    @staticmethod
    def loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
        return summed_cross_entropy(class_logits(model, batch), batch.labels)

    @staticmethod
    def sums(model: PreTrainedModel, batch: Batch) -> Sums:
        logits_BC = class_logits(model, batch)
        classes = logits_BC.shape[-1]
        cells_B = batch.labels * classes + logits_BC.argmax(-1)
        return {
            "loss": summed_cross_entropy(logits_BC, batch.labels).cpu().double(),  # not every device has float64
            "confusion": torch.bincount(cells_B, minlength=classes**2).reshape(classes, classes),
        }

    @staticmethod
    def figures(sums: Sums) -> Metrics:
        confusion = sums["confusion"].cpu().double()
        return {
            "loss": float(sums["loss"]) / float(confusion.sum()),
            "accuracy": float(confusion.trace() / confusion.sum()),
            "macro_f1": macro_f1(confusion),
            "matthews_correlation": matthews_correlation(confusion),
        }


def class_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """(B, C). Decoders are read at each row's last token by position.

    Their own forward would look for the pad id instead, which fails where there is none and reads the wrong
    token where a text holds it.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if not hasattr(model, "score"):
        return model(**inputs).logits
    hidden_BTD = model.base_model(**inputs, use_cache=False).last_hidden_state
    last_B = batch.attention_mask.sum(1) - 1
    return model.score(hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B])


def macro_f1(confusion_CC: Tensor) -> float:
    """The mean over classes of 2 tp / (2 tp + fp + fn); a class that neither occurs nor is predicted is left out."""
    hits_C = confusion_CC.diagonal()
    both_C = confusion_CC.sum(0) + confusion_CC.sum(1)
    return float((2 * hits_C / both_C)[both_C > 0].mean())


def matthews_correlation(confusion_CC: Tensor) -> float:
    """R_K for any number of classes (Gorodkin 2004, eq. 8); 0 where it is undefined."""
    total, hits = confusion_CC.sum(), confusion_CC.trace()
    truth_C, predicted_C = confusion_CC.sum(1), confusion_CC.sum(0)
    covariance = hits * total - truth_C @ predicted_C
    spread = (total**2 - truth_C @ truth_C) * (total**2 - predicted_C @ predicted_C)
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0
