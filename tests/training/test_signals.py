"""What a run does with the signals that ask it to stop. Whole runs that are stopped: tests/commands/test_resume.py."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lora_cli.distributed import World
from lora_cli.training.signals import STOPPING, StopRequest


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_signal_is_noted_and_interrupts_nothing(number):
    with StopRequest() as stop:
        assert not stop
        send(number)
        assert stop
        assert stop.signum == number


def test_the_first_of_two_signals_decides():
    with StopRequest() as stop:
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        assert stop.signum == signal.SIGUSR1


@pytest.mark.parametrize("first", STOPPING)
def test_a_sigint_after_another_signal_interrupts_at_once(first):
    with StopRequest() as stop:
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert stop.signum == first


def test_the_handlers_of_before_are_put_back_even_after_an_error():
    before = [signal.getsignal(number) for number in STOPPING]
    during = []

    def work() -> None:
        with StopRequest():
            during.extend(signal.getsignal(number) for number in STOPPING)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        work()
    assert [signal.getsignal(number) for number in STOPPING] == before != during


@pytest.mark.parametrize(
    ("agreed", "noted", "ignored"),
    [
        (None, None, []),
        (None, signal.SIGTERM, []),  # the run failed before all knew of it
        (signal.SIGTERM, None, [*STOPPING]),
        (signal.SIGTERM, signal.SIGTERM, [signal.SIGTERM, signal.SIGUSR1]),  # Ctrl-C is meant
        (signal.SIGINT, signal.SIGINT, [signal.SIGTERM, signal.SIGUSR1]),
    ],
)
def test_what_reaches_one_of_several_processes_late_does_not_end_it(monkeypatch, agreed, noted, ignored):
    now = {number: signal.getsignal(number) for number in STOPPING}
    monkeypatch.setattr(signal, "signal", lambda number, handler: now.update({number: handler}) or signal.SIG_DFL)
    stop = StopRequest(World(rank=1, size=2))
    with stop:
        stop.noted = noted
        stop.count([float(number == agreed) for number in STOPPING])
    assert [number for number, handler in now.items() if handler == signal.SIG_IGN] == ignored
    assert all(handler == signal.SIG_DFL for number, handler in now.items() if number not in ignored)


def test_in_another_thread_no_handler_is_set_and_nothing_fails():
    before, seen = [signal.getsignal(number) for number in STOPPING], []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(([signal.getsignal(number) for number in STOPPING], bool(stop)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
