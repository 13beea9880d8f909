"""What is made of measured values: medians with their spread, and ratios taken round by round."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

Values = list[float]


@dataclass(frozen=True)
class Spread:
    """A median of rounds, with the least and the most of them."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Values) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        least, most = f"{self.least:,.{digits}f}", f"{self.most:,.{digits}f}"
        return f"{self.median:,.{digits}f}" + (f" ({least}-{most})" if least != most else "")


def ratios(these: Values, those: Values) -> Values:
    """These over those of the same round: what slows a whole round down cancels, which medians apart would not give."""
    return [this / that for this, that in zip(these, those, strict=True)]


def scaled(values: Values, factor: float) -> Values:
    return [value * factor for value in values]
