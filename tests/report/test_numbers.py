"""Numbers as people read them: exact texts."""

from __future__ import annotations

import pytest

from lora_cli.report.numbers import duration, endings, number, plural, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (7, "7"),
        (1234567, "1,234,567"),
        (12345.6, "12,346"),
        (1000.0, "1,000"),
        (0.925, "0.925"),
        (0.92504, "0.925"),
        (0.5, "0.5"),
        (1.0, "1"),
        (2.0, "2"),
        (3.14159265, "3.1416"),
        (-0.25, "-0.25"),
        (0.001, "0.001"),
        (0.00012345, "0.000123"),
        (1e-9, "1e-09"),
        (-5e-5, "-5e-05"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_a_number_has_no_needless_digit(value, text):
    assert number(value) == text


@pytest.mark.parametrize("value", [0.1234, 0.9999, 12.5, 999.9, 0.0123, 0.00099, 45678.0, 1e-7])
def test_a_number_keeps_three_digits_of_its_value(value):
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=5e-3)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1536, "1.5 kB"),
        (4_000_000, "4.0 MB"),
        (987_650_000, "987.6 MB"),
        (16e9, "16.0 GB"),
        (2.5e12, "2500.0 GB"),
    ],
)
def test_a_size_counts_in_thousands_as_disks_do(num_bytes, text):
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (0.4, "0:00:00"), (59.6, "0:01:00"), (61, "0:01:01"), (3599.5, "1:00:00"), (360_000, "100:00:00")],
)
def test_a_duration_is_hours_minutes_and_seconds(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12345, "12,345 rows")])
def test_one_is_singular_and_all_else_is_plural(count, text):
    assert plural(count, "row") == text


def test_endings_are_told_once_in_the_order_of_the_model():
    names = ["layers.0.q_proj", "layers.0.mlp.up", "layers.1.q_proj", "layers.1.mlp.up", "head"]
    assert endings(names) == "q_proj, up, head"
