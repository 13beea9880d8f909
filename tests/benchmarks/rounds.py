"""Training on one shape: every contender and the limit in turn, round after round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.contenders import ABLATIONS, CONTENDERS
from tests.benchmarks.processes import Failed, measured
from tests.benchmarks.products import model_flops_per_token
from tests.benchmarks.shapes import SHAPES, Shape

LIMIT = "limit"
NO_CUDA, NOT_RUN = "not measured: no CUDA device", "not run"
Results = dict[str, Any]  # of one contender: each figure's values by round, or a text that says why there are none


def measure_shape(
    name: str, chosen: list[str], rounds: int, folder: Path, *, cuda: bool, ablation: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """The shape's section of the JSON document."""
    shape = SHAPES[name]
    facts = {"title": shape.title, "model_flops_per_token": model_flops_per_token(shape)}
    if shape.needs_cuda and not cuda:
        return facts | {"missing": NO_CUDA}
    base = str(folder / name)
    measured_base(name, base)
    results = _interleaved(_entries(shape, chosen, cuda, ablation), name, base, rounds, say)
    return facts | {
        "limit": results.pop(LIMIT),
        "contenders": {name: result for name, result in results.items() if name not in ABLATIONS},
        "ablations": {name: result for name, result in results.items() if name in ABLATIONS},
    }


def measured_base(name: str, base: str) -> None:
    """Weights and rows in a folder, written by a process of their own: this one stays small."""
    if not Path(base).exists():
        measured("bases", name, base)


def _entries(shape: Shape, chosen: list[str], cuda: bool, ablation: bool) -> dict[str, str | None]:
    """Who takes part, and why not."""
    entries = {name: CONTENDERS[name].why_not(shape, cuda=cuda) for name in CONTENDERS}
    entries |= {name: NOT_RUN for name, why_not in entries.items() if why_not is None and name not in chosen}
    if ablation:
        entries |= {name: ABLATIONS[name].why_not(shape, cuda=cuda) for name in ABLATIONS}
    return entries | {LIMIT: None}


def _interleaved(
    entries: dict[str, str | None], shape: str, base: str, rounds: int, say: Callable[[str], None]
) -> dict[str, Results | str]:
    """Each round begins with another contender, so that none is always the first on a cool machine."""
    results: dict[str, Any] = {name: why_not or {} for name, why_not in entries.items()}
    able = [name for name, why_not in entries.items() if why_not is None]
    for number in range(rounds):
        first = number % len(able)
        for name in able[first:] + able[:first]:
            if isinstance(results[name], str):
                continue  # it failed in an earlier round
            say(f"{shape}, round {number + 1} of {rounds}: {name}")
            try:
                figures = _one(name, shape, base)
            except Failed as error:
                results[name] = f"failed: {error}"
                continue
            for key, value in figures.items():
                results[name].setdefault(key, []).append(value)
    return results


def _one(name: str, shape: str, base: str) -> dict[str, float]:
    return measured("limit", shape) if name == LIMIT else measured("contenders", name, shape, base)
