"""Several processes for one run: starting them without torchrun, whether it started this one, and how it ends.

`lora train --nproc-per-node N` does on one machine what torchrun does: it hosts the store at which the
processes meet, starts them with torchrun's own machinery, passes signals on and waits. Unlike torchrun it
ends with the exit code of the process that failed first, and says nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from lora_cli.errors import UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What the processes are sent for each signal: a terminal that closes asks them to stop, too.
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGQUIT: signal.SIGTERM,
}


def launched() -> bool:
    """Whether torchrun (or something that speaks like it) started this process.

    Raises ``UsageError`` for half of its variables: training alone, N times into one folder, is no fallback.
    """
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(missing):  # an address alone, or nothing: clusters set it for others
        return False
    if missing:
        given = [name for name in VARIABLES if name not in missing]
        raise UsageError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set in the environment as by torchrun, "
            f"but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not",
            "start with torchrun, or use --nproc-per-node; for a single process unset them",
        )
    return True


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """A process of several ends where its command does, without waiting for Python to take itself apart.

    A thread of gloo's that is late may hold the last reference to a tensor that Python made. It asks for Python to let
    go of it, and up to Python 3.13 a thread that does so at the very end is thrown out of a destructor: SIGABRT, after
    all was well. Modules that torch imports along the way keep the process group, and so its threads, until then.
    """
    try:
        yield
    except SystemExit as end:
        if all(os.environ.get(name) for name in VARIABLES):
            _leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _leave(code: int) -> NoReturn:
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def check_count(processes: int) -> None:
    """Raises ``UsageError`` for what is no number of processes."""
    if processes < 1:
        raise UsageError(f"--nproc-per-node must be 1 or more, not {processes}")


def check_launch(processes: int) -> None:
    """Raises ``UsageError`` where processes cannot be started at all."""
    check_count(processes)
    if launched():
        raise UsageError(
            "--nproc-per-node starts processes, and this one was started by torchrun already", "leave the flag out"
        )


def check_devices(processes: int, use_cpu: bool) -> None:
    """Raises ``UsageError`` for more processes than GPUs, where there are any."""
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() and not use_cpu else processes
    if processes > devices:
        raise UsageError(
            f"--nproc-per-node {processes} needs {processes} CUDA devices, and there are {devices}",
            f"use --nproc-per-node {devices}, or training.use_cpu=true",
        )


def launch(processes: int, arguments: list[str]) -> int:
    """Run `lora ARGUMENTS` in so many processes that know one another. Returns the run's exit code."""
    import logging
    from tempfile import TemporaryDirectory

    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it tells of every process that ends
    ignored = [number for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]  # by nohup
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as folder:
        context = start_processes(
            "lora",
            sys.executable,
            args=dict.fromkeys(range(processes), ("-P", "-m", "lora_cli", *arguments)),  # no module of this folder
            envs={rank: environment(rank, processes, store.port) for rank in range(processes)},
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        _forward_signals(context, ignored)
        result = context.wait(period=0.1)
    assert result is not None
    return exit_code([failure.exitcode for failure in result.failures.values()])


def exit_code(codes: list[int]) -> int:
    """The run's, from those of its processes; minus n is one that signal n has ended.

    A signal that asks the run to stop and finds none yet is told as such. Where another one came from outside (1), the
    rest were asked to stop because of it.
    """
    if told := [code for code in codes if code > 0]:
        return told[0]
    if not all(-code in FORWARDED.values() for code in codes):
        return 1
    return 128 - codes[0] if codes else 0


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process on a single machine; and the cores are shared out, so that all run at once."""
    threads = max(1, len(_cores()) // processes)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def _cores() -> Any:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _forward_signals(context: Any, ignored: list[signal.Signals]) -> None:
    """The processes have sessions of their own, so a terminal's Ctrl-C reaches this one only."""

    def forward(signum: int, frame: FrameType | None) -> None:
        for pid in context.pids().values():
            try:
                os.kill(pid, FORWARDED[signal.Signals(signum)])
            except ProcessLookupError:  # it has just ended
                continue

    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN if number in ignored else forward)
