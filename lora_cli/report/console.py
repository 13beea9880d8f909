"""Where text goes: a terminal with colour and a moving bar, or a pipe with plain lines."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 160  # a pipe has no width; wide enough that no row is broken


class PatientFile(io.TextIOBase):
    """Standard output as it is now: a moving bar puts something else in its place, which writes to the console again.

    A terminal that was closed is a pipe that nobody reads any more.
    """

    def __init__(self) -> None:
        self._stream = sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        with _closed_is_broken():
            return self._stream.write(text)

    def flush(self) -> None:
        with _closed_is_broken():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


@contextmanager
def _closed_is_broken() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise BrokenPipeError(errno.EPIPE, "the terminal was closed") from error


class PatientConsole(Console):
    """Falls silent when nobody reads any more (`lora train ... | head`); the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_console() -> Console:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show braille shows question marks
    console = _console()
    return console if console.is_terminal else _console(PIPE_WIDTH)


def _console(width: int | None = None) -> Console:
    file: Any = PatientFile()
    return PatientConsole(file=file, highlight=False, emoji=False, markup=False, width=width)


def facts(console: Console, rows: list[tuple[str, str]]) -> None:
    """Name and text, in two columns; in a pipe without padding, so that lines can be compared and cut."""
    width = max(len(name) for name, _ in rows)
    if not console.is_terminal:
        for name, text in rows:
            indented = text.replace("\n", "\n" + " " * (width + 2))
            console.print(f"{name:<{width}}  {indented}", soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows:
        grid.add_row(name, text)
    console.print(grid)


def table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return made
