"""The door: results go out as JSON or on the screen, errors as one message and an exit code."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import typer

import lora_cli
from lora_cli.errors import LoraError, Stopped, ToldElsewhere, exit_code_of


def door(command: Callable[..., None]) -> Callable[..., None]:
    """The one place where an error becomes a message and an exit code."""

    @functools.wraps(command)
    def guarded(**flags: Any) -> None:
        try:
            command(**flags)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:  # `lora ... | head`: nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except BaseException as error:
            code = _report(error, debug=flags.get("debug", False), as_json=flags.get("as_json", False))
            raise typer.Exit(code) from None

    return guarded


def _report(error: BaseException, *, debug: bool, as_json: bool) -> int:
    """Say what happened and return the exit code."""
    code = exit_code_of(error)
    if isinstance(error, ToldElsewhere):
        return code
    if isinstance(error, LoraError):
        text = f"{error.origin}{error}"
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    else:
        text = f"this is a bug in lora: {type(error).__name__}: {error}\n    crash log: {_crash_log()}"
    if debug:
        traceback.print_exc()
    with contextlib.suppress(OSError):  # the terminal was closed
        if not isinstance(error, Stopped):  # to stop when asked is no error
            typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(text, err=True)
    if as_json:
        typer.echo(json.dumps({"error": {"exit_code": code, "kind": type(error).__name__, "message": text}}))
    return code


def _crash_log() -> str:
    import platform

    try:
        with tempfile.NamedTemporaryFile("w", prefix="lora-crash-", suffix=".log", delete=False) as file:
            file.write(f"lora {lora_cli.__version__}, Python {platform.python_version()}, {platform.platform()}\n")
            file.write(f"{' '.join(sys.argv)}\n\n{traceback.format_exc()}")
    except OSError as error:
        return f"could not be written ({error.strerror}); type the command again with --debug"
    return file.name


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def tell(result: Any, show: Callable[..., None], as_json: bool) -> None:
    """Print a command's result as JSON, or on the screen."""
    from lora_cli.report.console import make_console

    if as_json:
        print_json(result.to_dict())
    else:
        show(make_console(), result)
