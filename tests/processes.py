"""The command line in processes of its own, cheaply: forks of one process that has imported torch already."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lora_cli.errors import exit_code_of
from lora_cli.launch import environment

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["lora_cli.cli", "lora_cli.commands.train", "lora_cli.report.training", "tests.conftest"]
)


def start(
    folder: Path,
    *arguments: object,
    pause: float = 0.0,
    encoding: str = "",
    deaf: bool = False,
    variables: dict[str, str] | None = None,
) -> Any:
    """Run `lora ARGUMENTS`; what it prints is appended to ``stdout.txt`` and ``stderr.txt`` in ``folder``.

    ``pause``: seconds that each training step takes longer. ``encoding``: of its standard output. ``deaf``: its
    standard output is a pipe that nobody reads any more. ``variables``: of its environment.
    """
    texts = [*map(str, arguments)]
    process = PROCESSES.Process(target=_child, args=(str(folder), texts, pause, encoding, deaf, variables or {}))
    process.start()
    return process


def finish(process: Any, seconds: float = 120) -> int:
    process.join(seconds)
    assert process.exitcode is not None, "it does not end"
    return int(process.exitcode)


def printed(folder: Path, stream: str = "stderr") -> str:
    path = folder / f"{stream}.txt"
    return path.read_text() if path.exists() else ""


class Ranks:
    """So many processes of one run, as torchrun would start them, on this machine only."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's own

    def variables(self, rank: int) -> dict[str, str]:
        # The interface's name keeps gloo off the machine's other addresses.
        return environment(rank, self.count, self._store.port) | {"GLOO_SOCKET_IFNAME": "lo"}

    def start(self, folder: Path, *arguments: object, **options: Any) -> list[Any]:
        """`lora ARGUMENTS` in each; what they print goes to folders of their own: ``rank-0`` and so on."""
        return [self.start_one(rank, folder, *arguments, **options) for rank in range(self.count)]

    def start_one(self, rank: int, folder: Path, *arguments: object, **options: Any) -> Any:
        own = folder / f"rank-{rank}"
        own.mkdir(exist_ok=True)
        process = start(own, *arguments, variables=self.variables(rank), **options)
        process.ranks = self  # the store lives as long as its processes
        return process

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Any]:
        """What ``function(world, *arguments)`` gives in each process; an exception stands for itself."""
        ends = [PROCESSES.Pipe(duplex=False) for _ in range(self.count)]
        processes = [
            PROCESSES.Process(target=_joined, args=(self.variables(rank), ends[rank][1], function, arguments))
            for rank in range(self.count)
        ]
        for process, (_, writing) in zip(processes, ends, strict=True):
            process.start()
            writing.close()
        results = [_received(reading, seconds) for reading, _ in ends]
        self.codes = [finish(process) for process in processes]
        return results


def _received(reading: Any, seconds: float) -> Any:
    assert reading.poll(seconds), "it gives no answer"
    try:
        return reading.recv()
    except EOFError:  # it ended without a word
        return None


def _joined(variables: dict[str, str], writing: Any, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables)
    from lora_cli.distributed import joined

    try:
        with joined() as world:
            result = function(world, *arguments)
    except BaseException as error:
        writing.send(error)
        _end()
        sys.exit(exit_code_of(error))
    writing.send(result)


def _end() -> None:
    """What an ordinary process does last, and a fork does not."""
    atexit._run_exitfuncs()


def _child(
    folder: str, arguments: list[str], pause: float, encoding: str, deaf: bool, variables: dict[str, str]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(variables)
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
    try:
        cli.main()
    finally:
        sys.stdout.flush()
        _end()
