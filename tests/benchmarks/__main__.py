"""Speed and memory of this tool and of each peer that is installed, interleaved over several rounds.

python -m tests.benchmarks [SHAPE ...] [--rounds N] [--contenders a,b] [--ablation] [--json FILE]
python -m tests.benchmarks --table FILE ... [--into README.md]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lora_cli.report.console import make_console
from lora_cli.report.console import table as screen_table
from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.other import measure_other
from tests.benchmarks.processes import measured
from tests.benchmarks.rounds import measure_shape
from tests.benchmarks.shapes import SHAPES, unavailable
from tests.benchmarks.table import QUIET, heading, markdown, put_between_marks, tables

DEFAULT_SHAPES = [name for name in SHAPES if name != "micro"]
WAITS = 48  # of five seconds
OTHER = "other"  # on the command line, a shape like the rest


def main(arguments: list[str] | None = None) -> None:
    options = read_arguments(arguments)
    if options.table:
        text = markdown([json.loads(path.read_text(encoding="utf-8")) for path in options.table])
        if options.into:
            put_between_marks(options.into, text)
        else:
            print(text)  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as folder:
        document = measure(options, Path(folder), lambda text: print(text, file=sys.stderr))  # noqa: T201
    show(document)


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.benchmarks", description=__doc__.splitlines()[0])
    known = ", ".join([*SHAPES, OTHER])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"{known} (all but micro)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=list(CONTENDERS), metavar="A,B")
    parser.add_argument("--ablation", action="store_true", help="also ours with one thing changed at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, after every shape")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="FILE", help="print such files as markdown, measure nothing"
    )
    parser.add_argument("--into", type=Path, metavar="FILE", help="with --table: write between the marks of this file")
    options = parser.parse_args(arguments)
    _check_known(parser, "shape", options.shapes, [*SHAPES, OTHER])
    _check_known(parser, "contender", options.contenders, CONTENDERS)
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    for path in options.table or []:
        if not path.is_file():
            parser.exit(2, f"error: there is no file {path}\n")
    if options.json and not options.json.parent.is_dir():
        parser.exit(2, f"error: --json {options.json}: there is no folder {options.json.parent}\n")
    if options.into and not options.table:
        parser.error("--into goes with --table")
    options.shapes = options.shapes or [*DEFAULT_SHAPES, OTHER]
    options.command = f"{parser.prog} {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    return options


def _check_known(parser: argparse.ArgumentParser, what: str, given: list[str], known: Iterable[str]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        parser.exit(2, f"error: unknown {what}: {', '.join(unknown)}; known are {', '.join(known)}\n")


def wait_for_quiet(say: Callable[[str], None]) -> None:
    """The load is a mean of the last minute: what has just ended is still in it."""
    for number in range(WAITS):
        if os.getloadavg()[0] <= QUIET:
            return
        if number == 0:
            say(
                f"waiting until the machine is quiet (load {os.getloadavg()[0]:.1f}), at most {WAITS * 5 // 60} minutes"
            )
        time.sleep(5)


def measure(options: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The JSON document. It is written after every shape, so that a run cut short has not measured for nothing."""
    wait_for_quiet(say)
    began = time.perf_counter()
    document: dict[str, Any] = {"command": options.command, "machine": measured("machine")}
    document |= {"rounds": options.rounds, "shapes": {}}
    cuda = document["machine"]["cuda"]
    for name in options.shapes:
        if name == OTHER:
            document["other"] = measure_other(options.rounds, folder, say)
        else:
            document["shapes"][name] = measure_shape(
                name, options.contenders, options.rounds, folder, cuda=cuda, ablation=options.ablation, say=say
            )
        document["unavailable"] = unavailable()
        document["machine"] |= {"load_after": os.getloadavg()[0], "minutes": (time.perf_counter() - began) / 60}
        if options.json:
            options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return document


def show(document: dict[str, Any]) -> None:
    console = make_console()
    console.print(heading(document))
    for made in tables(document):
        on_screen = screen_table(*made.columns, right=tuple(range(1, len(made.columns))) if made.figures else ())
        for row in made.rows:
            on_screen.add_row(*row)
        console.print(f"\n{made.title}")
        console.print(on_screen)


if __name__ == "__main__":
    main()
