"""How many kernels oneDNN makes for the products of a run: one for each size that it meets.

Counted with ``ONEDNN_VERBOSE=profile_create`` for Llamas adapted on all seven projections: how many sizes a number of
tokens brings depends on the layer, not on its width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from lora_cli.data.batches import Batch
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import Sight
from lora_cli.ops.tiles import tiling_of

BATCHES_LOOKED_AT = 64  # each brings up to a hundred: after ten there are as many as are kept
OF_TRIALS = 100  # before the first step


@dataclass(frozen=True)
class Attention:
    """What decides how it is cut into tiles; of no heads where it is not."""

    heads: int
    kv_heads: int
    dtype: torch.dtype
    causal: bool

    def tiles(self, rows: Rows) -> set[tuple[int, int, int]]:
        """(matrices, queries, keys) of each."""
        if not self.heads:
            return set()
        query, key = (
            torch.empty(1, heads, 1, dtype=self.dtype, device="meta") for heads in (self.heads, self.kv_heads)
        )
        tiles = tiling_of(rows, query, key, Sight(1.0, causal=self.causal)).tiles
        return {(t.matrices, _length(t.queries) // t.matrices, _length(t.keys)) for t in tiles}


def _length(part: slice) -> int:
    return int(part.stop - part.start)


@dataclass
class Sizes:
    """The distinct ones: tokens of a line, tokens that the last layer looks at, positions with a target, tiles."""

    lines: set[int] = field(default_factory=set)
    endings: set[int] = field(default_factory=set)
    targets: set[int] = field(default_factory=set)
    tiles: set[tuple[int, int, int]] = field(default_factory=set)

    @staticmethod
    def of(batches: Iterable[Batch], attention: Attention, most_targets: int) -> Sizes:
        """Of no more than the first ``BATCHES_LOOKED_AT``. ``most_targets``: logits are made for so many at a time."""
        found = Sizes()
        for batch in islice(batches, BATCHES_LOOKED_AT):
            found.lines.add(batch.input_ids.numel())
            found.targets.add(min(batch.num_targets, most_targets))
            found.tiles |= attention.tiles(batch.rows)
            if batch.ending is not None:
                found.endings.add(len(batch.ending.places))
                found.tiles |= attention.tiles(batch.ending.rows)
        return found

    def without(self, others: Sizes) -> Sizes:
        return Sizes(
            self.lines - others.lines,
            self.endings - others.endings,
            self.targets - others.targets,
            self.tiles - others.tiles,
        )

    def numbers(self) -> Tensor:
        return torch.tensor([len(self.lines), len(self.endings), len(self.targets), len(self.tiles)])


TRAINED = torch.tensor([33, 29, 2, 4])  # kernels for each of the sizes, forward and backward
EVALUATED = torch.tensor([12, 12, 1, 2])  # forward


def count_kernels(trained: Sizes, evaluated: Sizes) -> int:
    """Of a run that trains on the former and evaluates on the latter."""
    rest = evaluated.without(trained)
    return OF_TRIALS + int(trained.numbers() @ TRAINED + rest.numbers() @ EVALUATED)
