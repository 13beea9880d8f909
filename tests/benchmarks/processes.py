"""Every measurement is a fresh process: nothing that another one left in memory helps or hurts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONWARNINGS": "ignore"}


class Failed(Exception):
    """The process ended with an error; the text is its last line."""


def run(*command: str) -> str:
    """What ``python COMMAND`` prints. Raises ``Failed``."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | OFFLINE, check=False, capture_output=True, text=True
    )
    if done.returncode < 0:
        raise Failed(f"ended by signal {-done.returncode}")  # 9: the system was out of memory, as a rule
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Failed(lines[-1].replace("|", "/")[:100])  # it may become a cell of a table
    return done.stdout


def measured(*command: str) -> Any:
    """The JSON document in the last line that ``python -m tests.benchmarks.COMMAND`` prints."""
    module, *arguments = command
    return json.loads(run("-m", f"tests.benchmarks.{module}", *arguments).splitlines()[-1])


def seconds_of(*command: str) -> float:
    began = time.perf_counter()
    run(*command)
    return time.perf_counter() - began


def seconds_to_line(start: str, *command: str) -> float:
    """From the start of ``python COMMAND`` to the first line it prints that begins with ``start``."""
    began, found = time.perf_counter(), None
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found is None and line.startswith(start):
                found = time.perf_counter() - began
    if process.returncode or found is None:
        raise Failed(f"exit code {process.returncode}, no line that begins with {start!r}")
    return found
