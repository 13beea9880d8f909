"""A curve drawn with characters."""

from __future__ import annotations

import math

HEIGHT = 8
WIDTH = 60
LOG_RATIO = 20  # a curve that falls by more than this is drawn on a logarithmic scale


def draw_curve(points: list[tuple[float, float]], *, width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Lines of text with (x, y) points drawn as braille dots, two columns and four rows a character.

    Fewer than two points make no curve.
    """
    if len(points) < 2:
        return []
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    ends = [f"{high:.4g}", f"{low:.4g}"]
    if is_logarithmic(ys):
        points = [(x, math.log(y)) for x, y in points]
        low, high = math.log(low), math.log(high)
    cells = [[0] * width for _ in range(height)]
    for dot_x, y in enumerate(_resample(points, 2 * width)):
        level = (high - y) / ((high - low) or 1.0)
        dot_y = min(4 * height - 1, int(level * (4 * height - 1) + 0.5))
        cells[dot_y // 4][dot_x // 2] |= _dot(dot_x % 2, dot_y % 4)
    labels = [ends[0]] + [""] * (height - 2) + [ends[1]]
    margin = max(map(len, labels))
    lines = [
        f"{label:>{margin}} │" + "".join(chr(0x2800 + cell) for cell in row)
        for label, row in zip(labels, cells, strict=True)
    ]
    first, last = f"{xs[0]:g}", f"{xs[-1]:g}"
    axis = " " * margin + " └" + "─" * width
    return [*lines, axis, " " * (margin + 2) + first + last.rjust(width - len(first))]


def is_logarithmic(ys: list[float]) -> bool:
    """Whether the heights span so much that a linear scale would show a cliff and a floor."""
    return min(ys) > 0 and max(ys) > LOG_RATIO * min(ys)


def _dot(x: int, y: int) -> int:
    """The bit of a braille dot (Unicode block U+2800)."""
    return (0x01, 0x02, 0x04, 0x40)[y] if x == 0 else (0x08, 0x10, 0x20, 0x80)[y]


def _resample(points: list[tuple[float, float]], count: int) -> list[float]:
    """The curve's height at ``count`` places of equal distance, straight between points."""
    result, segment = [], 0
    first, last = points[0][0], points[-1][0]
    for index in range(count):
        x = first + (last - first) * index / (count - 1)
        while segment < len(points) - 2 and points[segment + 1][0] < x:
            segment += 1
        (x0, y0), (x1, y1) = points[segment], points[segment + 1]
        part = 0.0 if x1 == x0 else min(1.0, max(0.0, (x - x0) / (x1 - x0)))
        result.append(y0 + part * (y1 - y0))
    return result
