"""Signals that ask a run to stop: it finishes its step, saves and leaves.

Where several processes train together, a signal may reach any of them. Each votes in the sums that a step
makes anyway, so all of them stop after the same step. A signal is sent to one process after the other: it may
reach one that has stopped for another's sake, and must not end it before it has said so.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from lora_cli.distributed import ALONE, World

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notes the first signal while the block runs; a second SIGINT interrupts at once.

    ``signum`` is the signal that the run stops for: this process's own if it is alone, else the one agreed upon.
    """

    def __init__(self, world: World = ALONE) -> None:
        self.noted: int | None = None
        self._agreed: int | None = None
        self._alone = world.size == 1
        self._before: dict[int, Any] = {}

    @property
    def signum(self) -> int | None:
        return self.noted if self._alone else self._agreed

    def __bool__(self) -> bool:
        return self.signum is not None

    @property
    def votes(self) -> list[float]:
        """One number a signal; their sums over all processes go to ``count``."""
        return [float(number == self.noted) for number in STOPPING]

    def count(self, votes: list[float]) -> None:
        self._agreed = self._agreed or next((int(n) for n, v in zip(STOPPING, votes, strict=True) if v), None)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._comes_late(number) else handler)

    def _comes_late(self, number: int) -> bool:
        """Whether all processes are leaving already, and this signal asks for nothing else."""
        impatient = number == signal.SIGINT and self.noted is not None
        return not self._alone and bool(self) and not impatient

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.noted is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt  # files are only ever replaced whole, so this harms nothing
        self.noted = self.noted or signum
