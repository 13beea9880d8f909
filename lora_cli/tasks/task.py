"""What the training loop asks of a task."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from lora_cli.data.batches import Batch
from lora_cli.fusion.network import Network

Sums = dict[str, Tensor]  # quantities that add up over batches
Metrics = dict[str, float]


class Task(Protocol):
    """Loss and metrics. A task holds no state: everything is a function of network and batch."""

    higher_is_better: ClassVar[frozenset[str]]

    @staticmethod
    def loss_sum(network: Network, batch: Batch) -> Tensor:
        """The loss summed over the batch's targets, float32; dividing it by their number is the loop's part."""

    @staticmethod
    def sums(network: Network, batch: Batch) -> Sums:
        """What an evaluation adds up."""

    @staticmethod
    def figures(sums: Sums) -> Metrics:
        """The metrics of a whole evaluation, from its sums."""
