"""Which rows a step sees, and how they become tensors.

The order is a pure function of (seed, epoch), and a step's rows of (recipe, step): so a resumed run sees what
the uninterrupted one would have seen, and nothing about the position has to be saved.

Shape suffixes: B rows of the micro-batch, T tokens of the longest, N tokens of all, M targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lora_cli.data.encoding import Example
from lora_cli.distributed import ALONE, World
from lora_cli.ops.rows import Ending, Rows
from lora_cli.ops.sending import send
from lora_cli.seeds import stream


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch lie: side by side and padded on the right, or end to end in a single line.

    A line's length is filled up to a ``multiple`` with a row of padding that nothing looks at, where matrix
    products of odd sizes are slow, or each size costs memory; a shorter line to a third of it, a short one not at all.
    """

    end_to_end: bool = False
    multiple: int = 1
    share: int = 0  # a prefix that all rows begin with is computed once if that spares so many tokens; 0: never
    looks_at: str | None = (
        None  # behind the last layer: each row's "targets", "first" or "last" token; None: at all of it
    )

    def filling(self, tokens: int) -> int:
        """How many tokens of padding a line of so many real ones gets: a tenth at most, so short ones get fewer."""
        steps = (self.multiple, max(1, self.multiple // 3)) if self.end_to_end else ()
        return next((-tokens % step for step in steps if tokens >= 10 * step), 0)


PADDED = Layout()
LEAST_SPARED = 0.2  # of a line's tokens: a layer that ends early is begun twice


@dataclass(frozen=True)
class Columns:
    """Where rows side by side have targets: a model's own head runs on the same positions of all rows."""

    chosen: Tensor  # (K,) int64: positions that some target is predicted at, ascending
    of_target: Tensor  # (M,) int64: which of them, for each target

    @staticmethod
    def of(places_M: np.ndarray, width: int) -> Columns:
        chosen_K, of_target_M = np.unique(places_M % width, return_inverse=True)
        return Columns(torch.from_numpy(chosen_K), torch.from_numpy(of_target_M))

    def to(self, device: torch.device) -> Columns:
        return Columns(send(self.chosen, device), send(self.of_target, device))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: its rows side by side, padded on the right, or end to end in a single line without padding.

    A target at position t is predicted at t - 1; ``places`` are those positions, counted through the whole of
    ``input_ids``. Everything whose size depends on values is found on the host, so that no device has to wait.
    """

    input_ids: Tensor  # (B, T) int64; (1, N) end to end
    rows: Rows  # with the filling row of a line, if it has one
    places: Tensor  # (M,) int64
    targets: Tensor  # (M,) int64
    target_rows: Tensor  # (M,) int64: whose target it is
    labels: Tensor | None  # (B,) int64 for a classifier
    where: list[str]
    num_targets: int
    examples: list[Example]  # the rows themselves
    columns: Columns | None = None  # of rows side by side: where the head is needed
    ending: Ending | None = None  # of a line: what is looked at behind the last layer, where it is not everything

    def __post_init__(self) -> None:
        assert tuple(self.input_ids.shape) in ((1, self.rows.num_tokens), (len(self.where), self.rows.longest))
        assert len(self.places) == len(self.targets) == len(self.target_rows)
        assert self.num_targets == (len(self.targets) if self.labels is None else len(self.labels)) > 0

    @property
    def num_rows(self) -> int:
        return len(self.where)

    @property
    def num_tokens(self) -> int:
        """Real ones: neither padding nor filling."""
        first = 1 if self.rows.prefix else 0
        return self.rows.prefix * self.num_rows + sum(self.rows.lengths[first : first + self.num_rows])

    def attention_mask(self) -> Tensor:
        """(B, T) int64, 1 on tokens and 0 on padding."""
        return (torch.arange(self.rows.longest) < torch.tensor(self.rows.lengths)[:, None]).long()

    def to(self, device: torch.device) -> Batch:
        """All of its tensors on the device, without waiting for the copies."""
        if device.type == "cpu":
            return self
        return replace(
            self,
            input_ids=send(self.input_ids, device),
            rows=self.rows.to(device),
            places=send(self.places, device),
            targets=send(self.targets, device),
            target_rows=send(self.target_rows, device),
            labels=None if self.labels is None else send(self.labels, device),
            columns=None if self.columns is None else self.columns.to(device),
            ending=None if self.ending is None else self.ending.to(device),
        )


def collate(examples: list[Example], pad_id: int, layout: Layout = PADDED) -> Batch:
    """One batch of these rows. Padding is known by position, never by its id."""
    prefix = shared_prefix(examples, layout.share) if layout.end_to_end else 0
    lengths = [len(example.input_ids) - prefix for example in examples]
    width = 0 if layout.end_to_end else max(lengths)  # from one row's beginning to the next one's; 0: its length
    starts = list(accumulate((width or length for length in lengths), initial=prefix))
    filling = layout.filling(starts[-1])
    ids = np.full(starts[-1] + filling, pad_id, dtype=np.int64)
    ids[:prefix] = examples[0].input_ids[:prefix]
    places, targets = [], []
    for example, start in zip(examples, starts, strict=False):
        ids[start : start + len(example.input_ids) - prefix] = example.input_ids[prefix:]
        supervised = np.flatnonzero(example.supervised)
        places.append(supervised + (start - prefix - 1))
        targets.append(example.input_ids[supervised].astype(np.int64))
    lengths = [*([prefix] if prefix else []), *lengths, *([filling] if filling else [])]
    counts = torch.tensor([len(found) for found in places])
    labels = None if examples[0].label is None else torch.tensor([example.label for example in examples])
    rows, places_M = Rows.of(lengths, prefix=prefix, filled=filling > 0), np.concatenate(places)
    return Batch(
        torch.from_numpy(ids.reshape(1 if layout.end_to_end else len(examples), -1)),
        rows,
        torch.from_numpy(places_M),
        torch.from_numpy(np.concatenate(targets)),
        torch.repeat_interleave(torch.arange(len(examples)), counts),
        labels,
        [example.where for example in examples],
        sum(example.num_targets for example in examples),
        examples,
        Columns.of(places_M, width) if width and labels is None else None,
        _ending(rows, places, layout) if layout.looks_at is not None else None,
    )


def _ending(rows: Rows, places: list[np.ndarray], layout: Layout) -> Ending | None:
    """What is looked at of each row: from its first target on, or one token. None where that spares too little.

    Of rows that nothing is read of it is their last token: a row is never empty.
    """
    begins, own = [row.start for row in rows.slices()], slice(int(rows.prefix > 0), int(rows.prefix > 0) + len(places))
    starts = [length - 1 for length in rows.lengths]
    if layout.looks_at == "first":
        starts[own] = [0] * len(places)
    if layout.looks_at == "targets":
        found = zip(places, begins[own], starts[own], strict=True)
        starts[own] = [int(some[0]) - begin if len(some) else start for some, begin, start in found]
        wanted = np.concatenate(places)
    else:
        wanted = np.array(begins[own]) + np.array(starts[own])
    one = layout.looks_at == "first"
    counts = [1 if one else length - start for length, start in zip(rows.lengths, starts, strict=True)]
    _fill_up(starts, counts, rows.lengths, layout.filling(sum(counts)))
    if sum(counts) > (1 - LEAST_SPARED) * rows.num_tokens:
        return None
    return Ending.of(rows, starts, counts, torch.from_numpy(wanted))


def _fill_up(starts: list[int], counts: list[int], lengths: tuple[int, ...], missing: int) -> None:
    """Let so many more tokens be looked at, in place: ahead of a row's stretch, or else behind it."""
    for number, length in enumerate(lengths):
        before = min(missing, starts[number])
        behind = min(missing - before, length - starts[number] - counts[number])
        starts[number] -= before
        counts[number] += before + behind
        missing -= before + behind


def shared_prefix(examples: list[Example], least: int) -> int:
    """How many tokens all rows begin with, if computing them once spares at least ``least`` tokens; else 0.

    It ends before any row's first target is predicted, and leaves every row a token of its own.
    """
    if not least or len(examples) < 2 or examples[0].label is not None:
        return 0
    firsts = [np.flatnonzero(example.supervised)[:1].sum() or len(example.input_ids) for example in examples]
    most = max(0, min(firsts) - 1)
    ids = np.stack([example.input_ids[:most] for example in examples])
    differs = np.flatnonzero((ids != ids[0]).any(0))
    prefix = int(differs[0]) if len(differs) else ids.shape[1]
    return prefix if prefix * (len(examples) - 1) >= least else 0


@dataclass(frozen=True)
class StepPlan:
    """Rows per optimizer step, and how they are cut into micro-batches.

    With a ``global_batch_size`` a step has so many rows, however many processes share them; else each process
    has ``accumulation`` micro-batches.
    """

    num_rows: int
    micro_batch_size: int
    accumulation: int
    seed: int
    shuffle: bool = True
    num_processes: int = 1
    global_batch_size: int | None = None

    @property
    def rows_per_step(self) -> int:
        return self.global_batch_size or self.micro_batch_size * self.accumulation * self.num_processes

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

    def rows(self, examples: list[Example], step: int) -> list[Example]:
        """The step's examples, the longest first."""
        return sorted((examples[row] for row in self.rows_of(step)), key=lambda e: -len(e.input_ids))

    def micro_batches(self, examples: list[Example], step: int, world: World = ALONE) -> list[list[Example]]:
        """One process's share of the step, in micro-batches of similar length: the same sum, with less padding.

        Every process takes each ``size``-th of the sorted rows, so all have about as much to do.
        """
        share = self.rows(examples, step)[world.rank :: world.size]
        size = self.micro_batch_size
        return [share[start : start + size] for start in range(0, len(share), size)]

    def num_micro_batches(self, step: int, world: World = ALONE) -> int:
        """How many the main process has in a step: no other one has more."""
        return math.ceil(math.ceil(len(self.rows_of(step)) / world.size) / self.micro_batch_size)

    def largest_micro_batch(self, examples: list[Example], total_steps: int, layout: Layout = PADDED) -> list[Example]:
        """The rows of the run's micro-batch with the most tokens, padding counted where there is some.

        It is some step's first, of the main process: micro-batches are cut from rows sorted by length.
        """
        lengths, best = np.array([len(example.input_ids) for example in examples]), (-1, 0)
        epochs = math.ceil(total_steps / self.steps_per_epoch) if self.shuffle else 1
        for epoch in range(epochs):
            order = _order(self.num_rows, self.seed, epoch) if self.shuffle else range(self.num_rows)
            rows = np.zeros((self.steps_per_epoch, self.rows_per_step), dtype=np.int64)
            rows.flat[: self.num_rows] = lengths[np.asarray(order)]
            ordered = -np.sort(-rows, axis=1)[: total_steps - epoch * self.steps_per_epoch, :: self.num_processes]
            first = ordered[:, : self.micro_batch_size]
            tokens = first.sum(1) if layout.end_to_end else first[:, 0] * (first > 0).sum(1)
            step = int(tokens.argmax())
            best = max(best, (int(tokens[step]), -(epoch * self.steps_per_epoch + step)))
        return self.micro_batches(examples, -best[1], World(0, self.num_processes))[0]


@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(num_rows, generator=stream(seed, "order", epoch)).tolist()


def evaluation_batches(
    examples: list[Example], size: int, pad_id: int, layout: Layout = PADDED, max_tokens: int | None = None
) -> Iterator[Batch]:
    """All rows once, the longest first, so that memory runs out at once or never.

    Batches are those of ``evaluation_rows``.
    """
    return (collate(rows, pad_id, layout) for rows in evaluation_rows(examples, size, layout, max_tokens))


def tokens_of(rows: list[Example], layout: Layout) -> int:
    """What a batch of these rows computes on: their tokens, and padding where there is some."""
    lengths = [len(row.input_ids) for row in rows]
    return sum(lengths) if layout.end_to_end else max(lengths) * len(lengths)


def evaluation_rows(
    examples: list[Example], size: int, layout: Layout, max_tokens: int | None
) -> Iterator[list[Example]]:
    """``size`` rows, or fewer where those would be more than ``max_tokens``; a single row always is a batch."""
    rows: list[Example] = []
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):
        too_many = max_tokens is not None and tokens_of([*rows, example], layout) > max_tokens
        if rows and (len(rows) == size or too_many):
            yield rows
            rows = []
        rows.append(example)
    if rows:
        yield rows
