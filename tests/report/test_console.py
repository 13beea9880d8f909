"""Where text goes, and what happens when nobody reads it any more."""

from __future__ import annotations

import errno
import io
import os
import pty
import sys

import pytest

from lora_cli.report.console import PIPE_WIDTH, PatientConsole, make_console


class Ended(io.StringIO):
    """Output that fails from some time on."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(("number", "silent"), [(errno.EIO, True), (errno.EPIPE, True), (errno.ENOSPC, False)])
def test_a_terminal_that_was_closed_and_a_pipe_that_nobody_reads_are_the_same(number, silent, monkeypatch):
    """A full disk is not."""
    closed: list[tuple[int, int]] = []
    monkeypatch.setattr(sys, "stdout", Ended(number))
    monkeypatch.setattr(PatientConsole, "on_broken_pipe", lambda console: closed.append(number))
    if silent:
        make_console().print("some text")
        assert closed == [number]
        return
    with pytest.raises(OSError, match="No space left"):
        make_console().print("some text")


def test_a_terminal_has_its_own_width_and_when_it_is_closed_all_is_quiet(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert make_console().width == PIPE_WIDTH
    primary, secondary = pty.openpty()
    with os.fdopen(secondary, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("COLUMNS", "77")
        console = make_console()
        assert console.is_terminal
        assert console.width == 77
        console.print("text")
        assert os.read(primary, 100).strip() == b"text"
        os.close(primary)
        console.print("nobody reads this")
        assert console.quiet
        console.print("nor this")
        monkeypatch.undo()
