"""A curve of characters, read back dot by dot."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_cli.report.curve import HEIGHT, WIDTH, draw_curve, is_logarithmic

DOTS = {(0, 0): 0x01, (0, 1): 0x02, (0, 2): 0x04, (0, 3): 0x40, (1, 0): 0x08, (1, 1): 0x10, (1, 2): 0x20, (1, 3): 0x80}


def heights(lines: list[str], width: int = WIDTH, height: int = HEIGHT) -> list[int]:
    """The row (0 at the top) of the dot in each of the 2 x width columns; fails unless there is exactly one."""
    rows = [line.partition("│")[2] for line in lines[:height]]
    assert [len(row) for row in rows] == [width] * height
    found = []
    for column in range(2 * width):
        cells = [ord(row[column // 2]) - 0x2800 for row in rows]
        dots = [4 * y + dot for y, cell in enumerate(cells) for dot in range(4) if cell & DOTS[column % 2, dot]]
        assert len(dots) == 1, column
        found.append(dots[0])
    return found


def test_a_straight_fall_runs_from_the_upper_left_to_the_lower_right_corner():
    bottom = 4 * HEIGHT - 1
    columns = 2 * WIDTH - 1
    expected = [int(bottom * column / columns + 0.5) for column in range(2 * WIDTH)]
    assert heights(draw_curve([(1, 2.0), (100, 1.0)])) == expected


def test_a_rise_is_the_fall_upside_down():
    fall, rise = heights(draw_curve([(1, 2.0), (9, 1.0)])), heights(draw_curve([(1, 1.0), (9, 2.0)]))
    assert fall[0] == rise[-1] == 0
    assert fall[-1] == rise[0] == 4 * HEIGHT - 1
    assert rise == pytest.approx(fall[::-1], abs=1)


def test_every_dot_is_on_the_straight_lines_between_the_points_however_they_are_spaced():
    xs, ys = [0, 1, 9, 10, 40], [3.0, 1.0, 2.5, 1.5, 1.0]
    at = np.interp(np.linspace(0, 40, 2 * WIDTH), xs, ys)
    expected = [int((3.0 - y) / 2.0 * (4 * HEIGHT - 1) + 0.5) for y in at]
    assert heights(draw_curve(list(zip(xs, ys, strict=True)))) == expected


def test_its_ends_are_labelled_with_the_extremes_and_the_first_and_last_step():
    lines = draw_curve([(1, 3.25), (50, 4.5), (1200, 0.75)])
    assert len(lines) == HEIGHT + 2
    assert lines[0].startswith(" 4.5 │")
    assert lines[HEIGHT - 1].startswith("0.75 │")
    assert lines[HEIGHT] == "     └" + "─" * WIDTH
    assert lines[HEIGHT + 1].split() == ["1", "1200"]
    assert len({len(line) for line in lines}) == 1


def test_a_flat_curve_is_a_flat_line_and_divides_by_nothing():
    assert len(set(heights(draw_curve([(1, 2.0), (5, 2.0), (9, 2.0)])))) == 1


@pytest.mark.parametrize("points", [[], [(1, 2.0)]])
def test_fewer_than_two_points_make_no_curve(points):
    assert draw_curve(points) == []


def test_two_points_at_the_same_step_do_not_divide_by_nothing():
    assert len(draw_curve([(4, 2.0), (4, 1.0)])) == HEIGHT + 2


@pytest.mark.parametrize(
    ("ys", "expected"), [([10.0, 0.4], True), ([10.0, 0.6], False), ([10.0, 0.0], False), ([5.0, -1.0], False)]
)
def test_only_a_positive_curve_that_spans_more_than_a_factor_of_20_is_logarithmic(ys, expected):
    assert is_logarithmic(ys) is expected


def test_an_exponential_fall_is_a_straight_line_on_the_logarithmic_scale():
    points = [(float(x), 100 * math.exp(-x / 8)) for x in range(41)]
    straight = heights(draw_curve([(0.0, 2.0), (40.0, 1.0)]))
    assert heights(draw_curve(points)) == pytest.approx(straight, abs=1)


def test_width_and_height_are_free():
    assert len(heights(draw_curve([(1, 2.0), (2, 1.0)], width=10, height=3), width=10, height=3)) == 20
