"""The micro-batch that needs most, found without collating any; and evaluation batches that need no more."""

from __future__ import annotations

import numpy as np
import pytest

from lora_cli.data.batches import (
    PADDED,
    Layout,
    StepPlan,
    evaluation_batches,
    evaluation_rows,
    tokens_of,
)
from lora_cli.data.encoding import Example

LINE = Layout(end_to_end=True)


def examples(*lengths: int) -> list[Example]:
    return [Example(np.arange(n, dtype=np.int32), np.arange(n) > 0, str(n)) for n in lengths]


@pytest.mark.parametrize("layout", [PADDED, LINE])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("rows", "micro", "accumulation", "steps"), [(23, 4, 2, 7), (9, 3, 1, 2), (5, 8, 1, 3)])
def test_it_is_the_largest_of_all_that_the_run_sees(layout, shuffle, rows, micro, accumulation, steps):
    data = examples(*(np.random.default_rng(rows).integers(2, 90, rows).tolist()))
    plan = StepPlan(rows, micro, accumulation, seed=1, shuffle=shuffle)
    seen = [tokens_of(batch, layout) for step in range(steps) for batch in plan.micro_batches(data, step)]
    assert tokens_of(plan.largest_micro_batch(data, steps, layout), layout) == max(seen)


def test_tokens_are_counted_with_the_padding_that_is_there():
    assert tokens_of(examples(5, 2, 3), LINE) == 10
    assert tokens_of(examples(5, 2, 3), PADDED) == 15


def test_evaluation_batches_hold_no_more_tokens_than_allowed():
    data = examples(9, 8, 3, 3, 2, 2)
    sizes = [batch.num_rows for batch in evaluation_batches(data, 4, 0, LINE, max_tokens=12)]
    assert sizes == [1, 2, 3]
    padded = [batch.num_rows for batch in evaluation_batches(data, 4, 0, PADDED, max_tokens=16)]
    assert padded == [1, 2, 3] or padded == [1, 1, 4]
    assert sum(padded) == len(data)
    assert [batch.num_rows for batch in evaluation_batches(data, 4, 0, LINE)] == [4, 2], "no limit"


def test_a_row_longer_than_allowed_is_a_batch_of_its_own():
    assert [batch.num_rows for batch in evaluation_batches(examples(30, 2, 2), 4, 0, LINE, max_tokens=8)] == [1, 2]


def test_the_rows_of_evaluation_batches_are_known_without_collating_any():
    found = evaluation_rows(examples(8, 3, 3, 3, 3, 3, 3), 4, LINE, max_tokens=10)
    assert [len(rows) for rows in found] == [1, 3, 3]
