"""Everything that can go wrong for a reason outside this program, as one tree.

    LoraError
    ├── UsageError           2   a wrong flag, argument, model or adapter
    │   └── RecipeError      2   one or more mistakes in a recipe, each with its place
    ├── NonFiniteError       3   a loss or gradient that is not a number
    ├── OutOfMemoryError     4   the device's memory did not suffice
    ├── StorageError         5   storage is full, unwritable or damaged
    ├── DataError            6   rows that cannot be used
    ├── FolderInUseError     7   another run holds the output folder
    ├── LostProcessError     1   another process of the run was ended from outside
    ├── Stopped        128 + n   signal n arrived; the state is saved
    └── ToldElsewhere            another process of the run tells the error; this one leaves with its code

Anything else that reaches the door (``cli.py``) is a bug: exit code 1 and a crash log.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

KeyPath = tuple[str | int, ...]


class LoraError(Exception):
    """Something the user can mend. ``message`` says what, ``help`` says how."""

    exit_code = 2
    agreed = False  # whether all processes of the run know of it (``distributed.py``)
    origin = ""  # which of them met it, where that is not the main one

    def __init__(self, message: str, help: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.help = help

    def __str__(self) -> str:
        return self.message if self.help is None else f"{self.message}\n    help: {self.help}"


class UsageError(LoraError):
    """A flag, argument, model folder or adapter folder that cannot be used."""


@dataclass(frozen=True)
class Mistake:
    """One wrong place of a recipe: the key it belongs to, what is wrong, and the way out."""

    path: KeyPath
    message: str
    help: str | None = None
    at_key: bool = False  # underline the key instead of its value

    @property
    def name(self) -> str:
        """The dotted key; an item of a list goes by the list's name, and is shown by its place."""
        return ".".join(part for part in self.path if isinstance(part, str))


class Places(Protocol):
    """Whoever knows where each key was written (``recipe/source.py``)."""

    def render(self, mistakes: list[Mistake]) -> str: ...


class RecipeError(UsageError):
    """All mistakes of a recipe at once, shown at their places where ``source`` knows them."""

    def __init__(self, mistakes: Iterable[Mistake], source: Places | None = None) -> None:
        self.mistakes = list(mistakes)
        self.source = source
        super().__init__("; ".join(f"{m.name}: {m.message}" for m in self.mistakes))

    def __str__(self) -> str:
        if self.source is not None:
            return self.source.render(self.mistakes)
        lines = []
        for mistake in self.mistakes:
            lines.append(f"{mistake.name}: {mistake.message}")
            if mistake.help:
                lines.append(f"    help: {mistake.help}")
        return "\n".join(lines)


class NonFiniteError(LoraError):
    """Raised before the update that would have destroyed the weights."""

    exit_code = 3


class OutOfMemoryError(LoraError):
    exit_code = 4


class StorageError(LoraError):
    exit_code = 5


class DataError(LoraError):
    exit_code = 6


class FolderInUseError(LoraError):
    exit_code = 7


class LostProcessError(LoraError):
    exit_code = 1


class SeveralErrors(LoraError):
    """Independent errors told together; the exit code is the first one's."""

    def __init__(self, errors: list[LoraError]) -> None:
        super().__init__("; ".join(error.message for error in errors))
        self.errors = errors
        self.exit_code = errors[0].exit_code

    def __str__(self) -> str:
        return "\nerror: ".join(map(str, self.errors))


class Problems:
    """Collects the errors of steps that do not depend on each other, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self.errors: list[LoraError] = []

    def __enter__(self) -> Problems:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, LoraError):
            if str(error) not in map(str, self.errors):  # a missing folder is missed by model and tokenizer alike
                self.errors.append(error)
            return True
        return False

    def stop_if_any(self) -> None:
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise SeveralErrors(self.errors)


class Stopped(LoraError):
    """A signal asked the run to stop, and its state is on disk."""

    def __init__(self, signum: int, message: str, help: str | None = None) -> None:
        super().__init__(message, help)
        self.signum = signum
        self.exit_code = 128 + signum

    @property
    def signal_name(self) -> str:
        return signal.Signals(self.signum).name


class ToldElsewhere(LoraError):
    """Raised in the processes of a run that leave because of an error which another one tells."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of the run tells why")
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int:
    """1 is a bug."""
    if isinstance(error, LoraError):
        return error.exit_code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def first_line(error: BaseException) -> str:
    """The first line of a message, and the next where it ends in a colon: there the reason follows."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
