"""``metrics.jsonl``, and the trackers that people look at instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from lora_cli.errors import LoraError, UsageError, first_line
from lora_cli.storage import storage_errors

Line = dict[str, Any]


class MetricsFile:
    """One JSON object a line. A resumed run cuts off what came after its checkpoint."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        self.path = path
        with storage_errors(path):
            path.touch()
            with open(path, "r+b") as file:
                file.truncate(min(keep_bytes, path.stat().st_size))

    def write(self, line: Line) -> None:
        with storage_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def read(self) -> list[Line]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


class NoMetrics(MetricsFile):
    """Of the processes that write no files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: Line) -> None: ...

    @property
    def size(self) -> int:
        return 0

    def read(self) -> list[Line]:
        return []


class Tracker(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``output_dir/tensorboard``. A resumed run hides what came after its checkpoint."""

    def __init__(self, output_dir: Path, step: int) -> None:
        _require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLike:
    """Weights & Biases, and Trackio, which speaks the same language."""

    def __init__(self, name: str, output_dir: Path, recipe: dict[str, Any]) -> None:
        self.module = _require(name, name)
        self.module.init(project="lora", name=output_dir.name, config=recipe)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], Tracker]] = {
    "tensorboard": lambda output_dir, recipe, step: TensorBoard(output_dir, step),
    "wandb": lambda output_dir, recipe, step: WandbLike("wandb", output_dir, recipe),
    "trackio": lambda output_dir, recipe, step: WandbLike("trackio", output_dir, recipe),
}


def build_trackers(names: list[str], output_dir: Path, recipe: dict[str, Any], step: int = 0) -> list[Tracker]:
    """Start the trackers of a run that goes on after ``step``. Raises ``UsageError`` for one that cannot start."""
    trackers: list[Tracker] = []
    for name in names:
        try:
            trackers.append(TRACKERS[name](output_dir, recipe, step))
        except LoraError:
            raise
        except Exception as error:  # no account, no network, an old version: each has exceptions of its own
            raise UsageError(f"training.report_to: {name} cannot start: {first_line(error)}") from error
    return trackers


def check_trackers(names: list[str]) -> None:
    """Raises ``UsageError`` for a tracker that is not installed, before anything is spent."""
    for name in names:
        _require(name, name)


def _require(module: str, extra: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"training.report_to: {module} is not installed", f"pip install 'lora-cli[{extra}]'") from None
