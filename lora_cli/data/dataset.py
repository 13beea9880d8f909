"""The examples of a recipe: rows read, encoded and counted, with evaluation rows kept apart."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from lora_cli.data.encoding import Example
from lora_cli.data.formats import Content, Labelled, choose_format, read_content
from lora_cli.data.rows import BadRow, Row, Rows, raise_bad_rows, read_rows
from lora_cli.errors import DataError, LoraError, Mistake, RecipeError
from lora_cli.recipe import DatasetSection
from lora_cli.seeds import stream

FORMAT_ROWS = 100  # rows that are asked for their format, at most


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows that were understood, before their tokens are known."""

    contents: list[tuple[Content, str]]
    bad: list[BadRow]
    format: str
    sources: list[str]


@dataclass
class Counts:
    """What became of the rows. Every row is counted somewhere."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    targets: int = 0  # supervised tokens, or labels
    longest: int = 0
    truncated: int = 0  # cut at max_length
    skipped: int = 0  # left out for their length
    unsupervised: int = 0  # left out: no supervised token
    bad: list[BadRow] = field(default_factory=list)

    def add(self, example: Example) -> None:
        self.examples += 1
        self.tokens += len(example.input_ids)
        self.targets += example.num_targets
        self.longest = max(self.longest, len(example.input_ids))
        self.truncated += example.truncated


@dataclass(frozen=True)
class Dataset:
    """The examples to train and to evaluate on, and what became of every row."""

    train: list[Example]
    eval: list[Example]
    train_counts: Counts
    eval_counts: Counts
    format: str
    sources: list[str]

    def fingerprint(self) -> str:
        """A hash of every token and mask: other data, another run."""
        digest = hashlib.sha256()
        for example in [*self.train, *self.eval]:
            digest.update(example.input_ids.tobytes())
            digest.update(example.supervised.tobytes())
            digest.update(repr(example.label).encode())
        return digest.hexdigest()


def read_train(section: DatasetSection, task: str) -> Reading:
    return _understand(section, task, read_rows(section, section.path, section.split))


def read_eval(section: DatasetSection, task: str) -> Reading | None:
    """The separate evaluation rows, if the recipe names any."""
    if not section.eval_path and not section.eval_split:
        return None
    paths = section.eval_path or section.path
    split = section.eval_split or "train"
    unlimited = section.model_copy(update={"max_samples": None})
    return _understand(section, task, read_rows(unlimited, paths, split))


def _understand(section: DatasetSection, task: str, rows: Rows) -> Reading:
    if not rows.rows:
        raise_bad_rows(rows.bad, len(rows.bad))
    format = _format_of(section, task, rows.rows)
    contents, bad = [], list(rows.bad)
    for row in rows.rows:
        content = _content(format, row, section)
        if isinstance(content, BadRow):
            bad.append(content)
        else:
            contents.append((content, row.where))
    return Reading(contents, bad, format, rows.sources)


def _format_of(section: DatasetSection, task: str, rows: list[Row]) -> str:
    """The format of the first row that fits one: a first row that is bad must not decide for all."""
    try:
        return choose_format(task, section.format, list(rows[0].columns), section.columns)
    except LoraError as error:
        for row in rows[1:FORMAT_ROWS]:
            with contextlib.suppress(LoraError):
                return choose_format(task, section.format, list(row.columns), section.columns)
        if isinstance(error, DataError):
            raise DataError(f"{rows[0].where}: {error.message}", error.help) from None
        raise


def _content(format: str, row: Row, section: DatasetSection) -> Content | BadRow:
    try:
        return read_content(format, row.columns, section.columns)
    except ValueError as error:
        return BadRow(row.where, str(error))


_CLASS_NUMBER = re.compile("0|[1-9][0-9]{0,4}")  # longer numbers are names: a head of a million classes is none


def labels_of(readings: list[Reading]) -> list[str]:
    """The label names that stand in the training rows. Numbers are class indices: gaps are classes too."""
    found = {content.label for content, _ in readings[0].contents if isinstance(content, Labelled)}
    if all(_CLASS_NUMBER.fullmatch(label) for label in found):
        return [str(number) for number in range(max(map(int, found), default=-1) + 1)]
    return sorted(found)


Encoder = Callable[[Content, str], "list[Example]"]


def build_dataset(
    section: DatasetSection, encode: Encoder, train: Reading, separate: Reading | None, seed: int
) -> Dataset:
    """Encode all rows and split off the evaluation rows.

    Raises ``DataError`` for bad rows (unless they are to be skipped) and where nothing is left to learn.
    """
    examples, counts = _encode(train, encode)
    held_out, eval_counts = _encode(separate, encode) if separate else ([], Counts())
    bad = [*counts.bad, *eval_counts.bad]
    if bad and section.on_bad_row == "error":
        raise_bad_rows(bad, counts.rows + eval_counts.rows)
    _check_supervised(counts, section, "train")
    if separate:
        _check_supervised(eval_counts, section, "evaluate")
    elif section.eval_size:
        examples, held_out = _split(examples, section, seed)
        counts, eval_counts = _recount(counts, examples), _recount(Counts(), held_out)
    sources = train.sources + (separate.sources if separate else [])
    return Dataset(examples, held_out, counts, eval_counts, train.format, sources)


def _encode(reading: Reading, encode: Encoder) -> tuple[list[Example], Counts]:
    examples: list[Example] = []
    counts = Counts(rows=len(reading.contents) + len(reading.bad), bad=list(reading.bad))
    for content, where in reading.contents:
        try:
            found = encode(content, where)
        except ValueError as error:
            counts.bad.append(BadRow(where, str(error)))
            continue
        counts.skipped += not found
        for example in found:
            if example.num_targets:
                counts.add(example)
                examples.append(example)
            else:
                counts.unsupervised += 1
    return examples, counts


def _check_supervised(counts: Counts, section: DatasetSection, purpose: str) -> None:
    if counts.examples:
        return
    reasons = [
        f"{count} {what}"
        for count, what in [
            (len(counts.bad), "bad"),
            (counts.skipped, f"longer than max_length {section.max_length}"),
            (counts.unsupervised, f"without a supervised token in the first {section.max_length} tokens"),
        ]
        if count
    ]
    raise DataError(
        f"no row is left to {purpose} on: of {counts.rows} rows {', '.join(reasons)}",
        "raise dataset.max_length, or look at the rows",
    )


def _split(examples: list[Example], section: DatasetSection, seed: int) -> tuple[list[Example], list[Example]]:
    size = section.eval_size
    count = max(1, round(size * len(examples))) if isinstance(size, float) else size
    if count >= len(examples):
        message = f"keeps {count} of {len(examples)} rows from training: none is left"
        raise RecipeError([Mistake(("dataset", "eval_size"), message)])
    order = torch.randperm(len(examples), generator=stream(seed, "eval_split")).tolist()
    chosen = set(order[:count])
    kept = [example for index, example in enumerate(examples) if index not in chosen]
    return kept, [examples[index] for index in sorted(chosen)]


def _recount(before: Counts, examples: list[Example]) -> Counts:
    counts = Counts(before.rows, skipped=before.skipped, unsupervised=before.unsupervised, bad=before.bad)
    for example in examples:
        counts.add(example)
    return counts


def label_counts(examples: list[Example], num_labels: int) -> list[int]:
    return np.bincount([example.label or 0 for example in examples], minlength=num_labels).tolist()
