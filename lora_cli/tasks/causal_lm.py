"""Next-token prediction on supervised positions.

Shape suffixes: B rows, M supervised positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lora_cli.data.batches import Batch
from lora_cli.fusion.network import Network
from lora_cli.ops.cross_entropy import head_loss, head_statistics, summed_cross_entropy
from lora_cli.tasks.task import Metrics, Sums


class CausalLM:
    higher_is_better: ClassVar[frozenset[str]] = frozenset({"token_accuracy", "exact_match"})

    @staticmethod
    def loss_sum(network: Network, batch: Batch) -> Tensor:
        if network.head is not None:
            return head_loss(network.supervised_hidden(batch), network.head, batch.targets)
        return summed_cross_entropy(network.supervised_logits(batch), batch.targets)

    @staticmethod
    def sums(network: Network, batch: Batch) -> Sums:
        if network.head is not None:
            loss, right_M = head_statistics(network.supervised_hidden(batch), network.head, batch.targets)
        else:
            logits_MV = network.supervised_logits(batch)
            loss, right_M = summed_cross_entropy(logits_MV, batch.targets), logits_MV.argmax(-1) == batch.targets
        rows = len(batch.where)
        wrong_B = torch.zeros(rows, device=right_M.device).index_add_(0, batch.target_rows, (~right_M).float())
        return {
            "loss": loss.cpu().double(),  # not every device has float64
            "targets": torch.tensor(batch.num_targets),
            "correct": right_M.sum(),
            "rows": torch.tensor(rows),
            "exact": (wrong_B == 0).sum(),
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
