"""Learning rates against closed forms and transformers; every form of a cadence."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from lora_cli.recipe import TrainingSection
from lora_cli.training.schedule import DECAYS, is_due, lr_multiplier, steps_in

TOTAL, WARMUP = 50, 5
KINDS = [*DECAYS, "wsd"]


def curve(kind: str, total: int = TOTAL, warmup: int = WARMUP) -> list[float]:
    return [lr_multiplier(kind, step, total, warmup) for step in range(total)]


def test_the_recipe_knows_exactly_the_schedules_that_exist():
    choices = TrainingSection.model_fields["lr_scheduler_type"].annotation.__args__
    assert sorted(choices) == sorted(KINDS)


@pytest.mark.parametrize(
    ("kind", "closed_form"),
    [
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: 0.5 + 0.5 * math.cos(math.pi * p)),
        ("constant", lambda p: 1.0),
        ("cosine_with_min_lr", lambda p: 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * p))),
        ("wsd", lambda p: min(1.0, (TOTAL - (WARMUP + p * (TOTAL - WARMUP))) / 5)),
    ],
)
def test_after_the_warm_up_each_schedule_is_its_closed_form(kind, closed_form):
    expected = [closed_form((step - WARMUP) / (TOTAL - WARMUP)) for step in range(WARMUP, TOTAL)]
    assert curve(kind)[WARMUP:] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_after_the_warm_up_linear_and_cosine_are_those_of_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=40).lr_lambdas[0]
    ours = curve(kind, 40, warmup)
    assert ours[warmup:] == pytest.approx([theirs(step) for step in range(warmup, 40)], abs=1e-12)


def test_during_the_warm_up_ours_is_one_step_ahead_of_transformers():
    """Theirs begins at 0, so its first step trains nothing."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_scheduler("linear", optimizer, num_warmup_steps=5, num_training_steps=50).lr_lambdas[0]
    assert theirs(0) == 0.0
    assert curve("linear")[:4] == pytest.approx([theirs(step + 1) for step in range(4)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_up_of_w_steps_rises_from_one_wth_to_the_peak_in_equal_steps(kind):
    assert curve(kind)[:WARMUP] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total", [1, 2, 3, 10, 97])
def test_no_step_of_any_run_is_lost_and_none_exceeds_the_peak(kind, total):
    for warmup in range(total):
        values = curve(kind, total, warmup)
        assert min(values) > 0
        assert max(values) <= 1.0
        assert values[warmup] == pytest.approx(1.0) or kind == "wsd"


@pytest.mark.parametrize(("kind", "limit"), [("linear", 0.0), ("cosine", 0.0), ("wsd", 0.0), ("constant", 1.0)])
def test_a_long_run_ends_where_its_schedule_ends(kind, limit):
    assert curve(kind, 10_000, 0)[-1] == pytest.approx(limit, abs=1e-3)


def test_cosine_with_min_lr_ends_at_a_tenth_of_the_peak():
    assert curve("cosine_with_min_lr", 10_000, 0)[-1] == pytest.approx(0.1, abs=1e-6)


def test_wsd_is_at_its_peak_until_the_last_tenth_and_then_falls_in_equal_steps():
    values = curve("wsd", 100, 10)
    assert values[10:91] == [1.0] * 81
    assert values[90:] == pytest.approx([step / 10 for step in range(10, 0, -1)])


@pytest.mark.parametrize(
    ("count_or_fraction", "total", "expected"),
    [(0, 100, 0), (7, 100, 7), (0.0, 100, 0), (0.03, 100, 3), (0.03, 10, 1), (0.5, 7, 4), (0.999, 10, 10)],
)
def test_a_count_stays_and_a_fraction_of_the_run_is_rounded_up(count_or_fraction, total, expected):
    assert steps_in(count_or_fraction, total) == expected


@pytest.mark.parametrize("total", [100, 1000, 10_000])
def test_a_fraction_that_is_a_whole_number_of_steps_is_not_rounded_further_up(total):
    """0.07 * 100 is 7.000000000000001 in floating point, and still means 7."""
    assert [steps_in(percent / 100, total) for percent in range(1, 100)] == [
        percent * total // 100 for percent in range(1, 100)
    ]


@pytest.mark.parametrize(
    ("cadence", "expected"),
    [
        (1, list(range(1, 24))),
        (5, [5, 10, 15, 20, 23]),
        (23, [23]),
        (1000, [23]),
        (0.25, [6, 12, 18, 23]),
        (0.5, [12, 23]),
        (0.001, list(range(1, 24))),
        ("epoch", [10, 20, 23]),
    ],
)
def test_every_form_of_a_cadence_and_always_the_end(cadence, expected):
    assert [step for step in range(24) if is_due(cadence, step, 23, steps_per_epoch=10)] == expected
