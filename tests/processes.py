"""The command line in processes of its own, cheaply: forks of one process that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["lora_cli.cli", "lora_cli.commands.train", "lora_cli.report.training", "tests.conftest"]
)


def start(folder: Path, *arguments: object, pause: float = 0.0, encoding: str = "", deaf: bool = False) -> Any:
    """Run `lora ARGUMENTS`; what it prints is appended to ``stdout.txt`` and ``stderr.txt`` in ``folder``.

    ``pause``: seconds that each training step takes longer. ``encoding``: of its standard output. ``deaf``: its
    standard output is a pipe that nobody reads any more.
    """
    process = PROCESSES.Process(target=_child, args=(str(folder), [*map(str, arguments)], pause, encoding, deaf))
    process.start()
    return process


def finish(process: Any, seconds: float = 120) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "it does not end"
    return int(process.exitcode)


def printed(folder: Path, stream: str = "stderr") -> str:
    path = folder / f"{stream}.txt"
    return path.read_text() if path.exists() else ""


def _child(folder: str, arguments: list[str], pause: float, encoding: str, deaf: bool) -> None:
    torch.set_num_threads(1)
    tempfile.tempdir = folder  # where a crash log would go
    for descriptor, name in [(1, "stdout.txt"), (2, "stderr.txt")]:
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if deaf:
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
    sys.stdout = open(1, "w", encoding=encoding or "utf-8", closefd=False)  # noqa: SIM115 -- until the process ends
    from lora_cli import cli
    from lora_cli.training import loop

    train_step = loop.train_step

    def slow(*anything: Any, **more: Any) -> Any:
        time.sleep(pause)
        return train_step(*anything, **more)

    loop.train_step = slow
    sys.argv = ["lora", *arguments]
    cli.main()
