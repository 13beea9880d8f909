"""Order, steps and padding: each row once an epoch, whatever the batch size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_cli.data.batches import PADDED, Batch, Layout, StepPlan, collate, evaluation_batches, shared_prefix
from lora_cli.data.encoding import Example
from lora_cli.distributed import World

FUZZ = settings(derandomize=True, database=None, deadline=None, max_examples=60)
PLANS = st.builds(
    StepPlan,
    num_rows=st.integers(1, 40),
    micro_batch_size=st.integers(1, 9),
    accumulation=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)


def example(ids: list[int], supervised: list[int], where: str = "x", label: int | None = None) -> Example:
    mask = np.zeros(len(ids), dtype=bool)
    mask[supervised] = True
    return Example(np.array(ids, dtype=np.int32), mask, where, label)


def rows_of_lengths(*lengths: int) -> list[Example]:
    return [example(list(range(n)), [n - 1], f"row {index}") for index, n in enumerate(lengths)]


def epoch(plan: StepPlan, number: int) -> list[int]:
    first = number * plan.steps_per_epoch
    return [row for step in range(first, first + plan.steps_per_epoch) for row in plan.rows_of(step)]


# --- order


@FUZZ
@given(plan=PLANS, number=st.integers(0, 50))
def test_each_row_once_an_epoch(plan: StepPlan, number: int):
    assert sorted(epoch(plan, number)) == list(range(plan.num_rows))


@FUZZ
@given(plan=PLANS, steps=st.lists(st.integers(0, 100), max_size=8))
def test_order_is_a_function_of_seed_and_step(plan: StepPlan, steps: list[int]):
    """Whatever was asked before: a resumed run sees what the uninterrupted one would have seen."""
    asked = {step: plan.rows_of(step) for step in steps}
    again = StepPlan(plan.num_rows, plan.micro_batch_size, plan.accumulation, plan.seed, plan.shuffle)
    for step in reversed(steps):
        assert again.rows_of(step) == asked[step]


def test_what_is_returned_may_be_changed():
    plan = StepPlan(8, 4, 1, seed=0)
    before = plan.rows_of(0)
    plan.rows_of(0).clear()
    plan.rows_of(0).sort()
    assert plan.rows_of(0) == before


def test_epochs_and_seeds_have_orders_of_their_own():
    plan, other = StepPlan(30, 8, 1, seed=1), StepPlan(30, 8, 1, seed=2)
    orders = [tuple(epoch(p, number)) for p in (plan, other) for number in range(3)]
    assert len(set(orders)) == 6
    assert tuple(range(30)) not in orders


def test_without_shuffle_the_order_is_that_of_the_rows():
    plan = StepPlan(10, 2, 2, seed=1, shuffle=False)
    assert [plan.rows_of(step) for step in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("rows", "micro", "accumulation", "steps"),
    [(8, 4, 2, 1), (9, 4, 2, 2), (1, 8, 4, 1), (24, 4, 1, 6), (25, 4, 1, 7)],
)
def test_steps_per_epoch(rows: int, micro: int, accumulation: int, steps: int):
    plan = StepPlan(rows, micro, accumulation, seed=0)
    assert plan.steps_per_epoch == steps
    assert plan.rows_per_step == micro * accumulation
    assert plan.epoch_of(steps) == 1.0
    assert plan.epoch_of(0) == 0.0


# --- steps


def test_a_step_holds_the_same_rows_however_it_is_cut():
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1 rows."""
    examples = rows_of_lengths(*[3 + (7 * n) % 11 for n in range(21)])
    for step in range(6):
        cuts = []
        for micro, accumulation in [(1, 8), (2, 4), (4, 2), (8, 1)]:
            batches = StepPlan(21, micro, accumulation, seed=5).micro_batches(examples, step)
            assert all(len(batch) <= micro for batch in batches)
            assert len(batches) <= accumulation
            cuts.append(sorted(row.where for batch in batches for row in batch))
        assert cuts[0] == cuts[1] == cuts[2] == cuts[3]


@FUZZ
@given(plan=PLANS, step=st.integers(0, 60))
def test_micro_batches_are_the_steps_rows(plan: StepPlan, step: int):
    examples = rows_of_lengths(*[2 + (5 * n) % 13 for n in range(plan.num_rows)])
    batches = plan.micro_batches(examples, step)
    assert sorted(row.where for batch in batches for row in batch) == sorted(f"row {n}" for n in plan.rows_of(step))
    lengths = [len(row.input_ids) for batch in batches for row in batch]
    assert lengths == sorted(lengths, reverse=True)  # neighbours of like length: less padding


# --- collation


LINE = Layout(end_to_end=True)


def target_of(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, the token that it is predicted from, the target) of every target."""
    before = batch.input_ids.flatten()[batch.places]
    return list(zip(batch.target_rows.tolist(), before.tolist(), batch.targets.tolist(), strict=True))


def test_padding_and_targets():
    batch = collate([example([5, 6, 7], [1, 2], "a"), example([8, 9], [1], "b")], pad_id=3)
    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch.attention_mask().tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.places.tolist() == [0, 1, 3]
    assert target_of(batch) == [(0, 5, 6), (0, 6, 7), (1, 8, 9)]
    assert (batch.where, batch.num_targets, batch.num_tokens, batch.labels) == (["a", "b"], 3, 5, None)
    assert batch.input_ids.dtype == batch.places.dtype == batch.targets.dtype == torch.int64


def test_rows_end_to_end_hold_the_same_targets_without_padding():
    rows = [example([5, 6, 7], [1, 2], "a"), example([8, 9], [1], "b")]
    batch = collate(rows, 3, LINE)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.rows.lengths == (3, 2)
    assert batch.rows.bounds.tolist() == [0, 3, 5]
    assert batch.rows.positions().tolist() == [0, 1, 2, 0, 1]
    assert batch.places.tolist() == [0, 1, 3]
    assert target_of(batch) == target_of(collate(rows, 3))


def test_a_line_is_filled_up_with_a_row_that_counts_for_nothing():
    rows, layout = rows_of_lengths(20, 18), Layout(end_to_end=True, multiple=3)
    batch = collate(rows, 3, layout)
    assert batch.input_ids[0, 38:].tolist() == [3]
    assert batch.rows.lengths == (20, 18, 1)
    assert (batch.num_rows, batch.num_tokens, batch.num_targets) == (2, 38, 2)
    assert target_of(batch) == target_of(collate(rows, 3))


def test_a_line_that_is_short_or_round_is_left_as_it_is():
    numbers = (1, 159, 160, 161, 479, 480, 481, 1000)
    assert [Layout(end_to_end=True, multiple=48).filling(n) for n in numbers] == [0, 0, 0, 15, 1, 0, 47, 8]
    assert [Layout(end_to_end=True).filling(n) for n in numbers] == [0] * 8
    assert max(Layout(end_to_end=True, multiple=48).filling(n) / n for n in range(1, 3000)) < 0.1
    assert Layout(end_to_end=False, multiple=48).filling(481) == 0


def test_a_prefix_that_all_rows_begin_with_stands_once():
    rows = [example([1, 2, 3, 4, 5], [4], "a"), example([1, 2, 3, 6, 7, 8], [4, 5], "b")]
    batch = collate(rows, 0, Layout(end_to_end=True, share=3))
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert (batch.rows.lengths, batch.rows.prefix) == ((3, 2, 3), 3)
    assert batch.rows.positions().tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert batch.rows.key_lengths == (3, 5, 6)
    assert batch.rows.key_places.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert target_of(batch) == target_of(collate(rows, 0))
    assert (batch.num_tokens, batch.num_rows) == (11, 2)
    assert collate(rows, 0, Layout(end_to_end=True, share=4)).rows.prefix == 0, "it would not spare enough"


def test_a_shared_prefix_ends_before_any_target_is_predicted():
    """Each row keeps the position that its first target is predicted from: there they are told apart."""
    rows = [example([1, 2, 3, 4, 5], [3], "a"), example([1, 2, 3, 4, 6], [4], "b")]
    assert shared_prefix(rows, 1) == 2
    assert shared_prefix([rows[0]], 1) == 0, "alone there is nobody to share with"
    assert shared_prefix([rows[0], example([9, 2, 3], [2])], 1) == 0
    assert shared_prefix([example([1, 2], [1]), example([1, 2], [1])], 1) == 0, "nothing before the first target"


def test_a_target_that_is_the_pad_id_stays_a_target():
    """Padding is known by position: where pad and end are one token, ends are learned."""
    batch = collate([example([5, 3, 3], [1, 2]), example([5, 3], [1])], pad_id=3)
    assert target_of(batch) == [(0, 5, 3), (0, 3, 3), (1, 5, 3)]
    assert batch.attention_mask().tolist() == [[1, 1, 1], [1, 1, 0]]


def test_labels_of_a_classifier():
    batch = collate([example([5, 6], [], label=2), example([7], [], label=0)], pad_id=0)
    assert batch.labels is not None
    assert batch.labels.tolist() == [2, 0]
    assert (batch.num_targets, len(batch.places)) == (2, 0)


def test_a_batch_checks_itself():
    batch = collate([example([5, 6, 7], [1, 2], "a"), example([8, 9], [1], "b")], pad_id=3)
    for wrong in [
        {"input_ids": batch.input_ids[:, :2]},
        {"where": ["a"]},
        {"num_targets": 2},
        {"places": batch.places[:2]},
    ]:
        with pytest.raises(AssertionError):
            replace(batch, **wrong)


def test_a_batch_on_a_device_is_the_same_batch():
    batch = collate(rows_of_lengths(2, 3), pad_id=0)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.input_ids, batch.input_ids)
    assert torch.equal(moved.targets, batch.targets)
    assert (moved.where, moved.num_targets) == (batch.where, batch.num_targets)


@pytest.fixture
def sent(monkeypatch) -> list[tuple[bool, bool]]:
    """How tensors leave for a CUDA device that is not here: (pinned, without waiting) of each."""
    pinned: list[Tensor] = []
    found: list[tuple[bool, bool]] = []
    own = Tensor.to

    def pin(tensor):
        pinned.append(tensor)
        return tensor

    def to(tensor, *given, **options):
        if given and given[0] == torch.device("cuda"):
            found.append((any(tensor is other for other in pinned), options.get("non_blocking", False)))
            return tensor
        return own(tensor, *given, **options)

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    return found


@pytest.mark.parametrize(
    ("layout", "count"),
    [(PADDED, 8), (Layout(end_to_end=True), 6), (Layout(end_to_end=True, share=1, looks_at="targets"), 11)],
)
def test_nothing_waits_for_a_batch_on_its_way_to_cuda(layout, count, sent):
    rows = [example([5, 6, *range(7, 17)], [11], "a"), example([5, 6, *[4] * 8], [9], "b")]
    collate(rows, 0, layout).to(torch.device("cuda"))
    assert sent == [(True, True)] * count


def test_processes_share_a_step_without_losing_or_doubling_a_row():
    """Each takes every second of the sorted rows, so both have about as many tokens."""
    plan, examples = StepPlan(16, 2, 2, seed=1), rows_of_lengths(*[2 + (5 * n) % 13 for n in range(16)])
    shares = [plan.micro_batches(examples, 0, World(rank, 2)) for rank in range(2)]
    rows = [[row for batch in share for row in batch] for share in shares]
    assert sorted(row.where for share in rows for row in share) == sorted(e.where for e in plan.rows(examples, 0))
    tokens = [sum(len(row.input_ids) for row in share) for share in rows]
    assert abs(tokens[0] - tokens[1]) < 13


@pytest.mark.parametrize("size", [1, 3, 7, 50])
def test_evaluation_sees_every_row_once_the_longest_first(size: int):
    examples = rows_of_lengths(*[2 + (5 * n) % 13 for n in range(20)])
    batches = list(evaluation_batches(examples, size, pad_id=0))
    assert [len(batch.where) for batch in batches] == [min(size, 20 - start) for start in range(0, 20, size)]
    assert sorted(where for batch in batches for where in batch.where) == sorted(e.where for e in examples)
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == max(len(e.input_ids) for e in examples)
