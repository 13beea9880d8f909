"""Which rows a step sees, and how they become tensors.

The order is a pure function of (seed, epoch), and a step's rows of (recipe, step): so a resumed run sees what
the uninterrupted one would have seen, and nothing about the position has to be saved.

Shape suffixes: B rows of the micro-batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lora_cli.data.encoding import Example
from lora_cli.seeds import stream

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """One micro-batch. ``labels`` holds a target at every supervised position, else IGNORE_INDEX."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 1 on tokens, 0 on padding
    labels: Tensor  # (B, T) int64; (B,) for a classifier
    where: list[str]
    num_targets: int

    def __post_init__(self) -> None:
        assert self.input_ids.shape == self.attention_mask.shape
        assert self.labels.shape[0] == self.input_ids.shape[0] == len(self.where)
        assert self.num_targets > 0

    @property
    def num_tokens(self) -> int:
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> Batch:
        ids, mask, labels = (t.to(device) for t in (self.input_ids, self.attention_mask, self.labels))
        return Batch(ids, mask, labels, self.where, self.num_targets)


def collate(examples: list[Example], pad_id: int) -> Batch:
    """Pad to the longest row on the right. Padding is known by position, never by its id."""
    length = max(len(example.input_ids) for example in examples)
    ids = np.full((len(examples), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(examples), length), dtype=np.int64)
    targets = np.full((len(examples), length), IGNORE_INDEX, dtype=np.int64)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size] = example.input_ids
        mask[row, :size] = 1
        targets[row, :size][example.supervised] = example.input_ids[example.supervised]
    labels = torch.from_numpy(targets)
    if examples[0].label is not None:
        labels = torch.tensor([example.label for example in examples])
    where = [example.where for example in examples]
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), labels, where, sum(e.num_targets for e in examples))


@dataclass(frozen=True)
class StepPlan:
    """Rows per optimizer step, and how they are cut into micro-batches."""

    num_rows: int
    micro_batch_size: int
    accumulation: int
    seed: int
    shuffle: bool = True

    @property
    def rows_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.rows_per_step)

    def epoch_of(self, step: int) -> float:
        """Epochs completed after ``step`` steps."""
        return step / self.steps_per_epoch

    def rows_of(self, step: int) -> list[int]:
        """The rows of the step that follows ``step`` finished ones. An epoch's last step may be smaller."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.num_rows, self.seed, epoch) if self.shuffle else range(self.num_rows)
        return list(order[position * self.rows_per_step : (position + 1) * self.rows_per_step])

    def micro_batches(self, examples: list[Example], step: int) -> list[list[Example]]:
        """The step's examples in micro-batches of similar length: the same sum, with less padding."""
        chosen = sorted((examples[row] for row in self.rows_of(step)), key=lambda e: -len(e.input_ids))
        size = self.micro_batch_size
        return [chosen[start : start + size] for start in range(0, len(chosen), size)]


@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(num_rows, generator=stream(seed, "order", epoch)).tolist()


def evaluation_batches(examples: list[Example], size: int, pad_id: int) -> Iterator[Batch]:
    """All rows once, the longest first, so that memory runs out at once or never."""
    ordered = sorted(examples, key=lambda e: -len(e.input_ids))
    for start in range(0, len(ordered), size):
        yield collate(ordered[start : start + size], pad_id)
