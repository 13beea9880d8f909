"""One label a row.

Shape suffixes: B rows, C classes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lora_cli.data.batches import Batch
from lora_cli.fusion.network import Network
from lora_cli.ops.cross_entropy import summed_cross_entropy
from lora_cli.tasks.task import Metrics, Sums


class SequenceClassification:
    higher_is_better: ClassVar[frozenset[str]] = frozenset({"accuracy", "macro_f1", "matthews_correlation"})

    @staticmethod
    def loss_sum(network: Network, batch: Batch) -> Tensor:
        return summed_cross_entropy(network.class_logits(batch), _labels(batch))

    @staticmethod
    def sums(network: Network, batch: Batch) -> Sums:
        logits_BC, labels_B = network.class_logits(batch), _labels(batch)
        classes = logits_BC.shape[-1]
        cells_B = labels_B * classes + logits_BC.argmax(-1)
        return {
            "loss": summed_cross_entropy(logits_BC, labels_B).cpu().double(),  # not every device has float64
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


def _labels(batch: Batch) -> Tensor:
    assert batch.labels is not None, "rows without labels do not reach a classifier"
    return batch.labels


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
