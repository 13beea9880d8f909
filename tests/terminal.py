"""The command line in a terminal of its own, with all that rich does there."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from lora_cli.launch import VARIABLES

LINES, COLUMNS = 40, 120
BEGIN = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal of this session, which hears when it is closed
os.execv(sys.executable, [sys.executable, "-m", "lora_cli", *sys.argv[1:]])
"""


class Terminal:
    def __init__(self, *arguments: object, folder: Path, variables: dict[str, str] | None = None) -> None:
        self.written = ""
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | (variables or {})
        self._process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, *map(str, arguments)],
            cwd=folder,
            env=environment | {"TERM": "xterm-256color"},
            start_new_session=True,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)

    @property
    def shown(self) -> str:
        """Without colours and movements of the cursor."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.written)

    def read_until(self, pattern: str | None, seconds: float = 60) -> None:
        """Until it is shown; None: until the command has ended."""
        deadline = time.monotonic() + seconds
        while pattern is None or not re.search(pattern, self.shown):
            if time.monotonic() > deadline:
                self._process.kill()
                raise AssertionError(f"{pattern} does not appear; the screen ends with {self.shown[-500:]!r}")
            if select.select([self._ours], [], [], 1.0)[0]:
                try:
                    self.written += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # nobody has it open any more
                    return

    def close(self) -> None:
        os.close(self._ours)

    def finish(self, seconds: float = 60) -> int:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
