"""When things happen and how large a step is: pure functions of the step, so nothing of them is saved."""

from __future__ import annotations

import math
from collections.abc import Callable

WSD_DECAY = 0.1  # fraction of the run in which wsd falls to 0
MIN_LR = 0.1  # where cosine_with_min_lr ends, as a fraction of the peak


def _linear(progress: float) -> float:
    return 1 - progress


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _constant(progress: float) -> float:
    return 1.0


def _cosine_with_min_lr(progress: float) -> float:
    return MIN_LR + (1 - MIN_LR) * _cosine(progress)


# progress in [0, 1) since the warm-up -> multiple of the peak learning rate
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
    "cosine_with_min_lr": _cosine_with_min_lr,
}


def lr_multiplier(kind: str, step: int, total: int, warmup: int) -> float:
    """The multiple of the peak learning rate for the step that follows ``step`` finished ones.

    Step n of a warm-up of W steps uses n / W, so the first step is never lost; the decay then runs from the
    peak to just above its end, as in transformers.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "wsd":
        decay = max(1, round(WSD_DECAY * total))
        return min(1.0, (total - step) / decay)
    return DECAYS[kind]((step - warmup) / max(1, total - warmup))


def steps_in(count_or_fraction: int | float, total: int) -> int:
    """A count as it is; a fraction of the run rounded up."""
    if not isinstance(count_or_fraction, float):
        return count_or_fraction
    return math.ceil(count_or_fraction * total * (1 - 1e-12))  # 0.07 * 100 is 7.000000000000001, and means 7


def is_due(cadence: int | float | str, step: int, total: int, steps_per_epoch: int) -> bool:
    """Whether something with this cadence happens after ``step`` steps; at the end it always does."""
    if step == total:
        return True
    every = steps_per_epoch if cadence == "epoch" else max(1, steps_in(cadence, total))  # type: ignore[arg-type]
    return step > 0 and step % every == 0
