"""The README's screens: ``python -m tests.screens`` runs the quickstart and writes them anew.

``test_screens.py`` holds them to what the program prints, but for the figures, which are this machine's.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import run_lora
from tests.readme import README, ROOT, with_parts

# In the order in which they can be run, by the README's marks.
COMMANDS = {
    "check": "lora check recipes/quickstart.yaml",
    "quickstart": "lora train recipes/quickstart.yaml",
    "merge": "lora merge runs/quickstart/adapter -o runs/quickstart/merged",
    "count": "lora count-params runs/quickstart/adapter",
    "inspect": "lora inspect runs/quickstart/adapter",
    "export": "lora export runs/quickstart/adapter --for vllm -o runs/quickstart/passive",
}


def prepare(folder: Path) -> None:
    """The recipes in ``folder``, which stands for the checkout: what is written stays there."""
    (folder / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)


def printed(command: str) -> str:
    """What it prints in the current folder, run in this process."""
    _, *words = shlex.split(command)
    recipe = ["training.use_cpu=true"] if words[1].endswith(".yaml") else []
    result = run_lora(*words, *recipe)
    assert result.code == 0, result.err
    return result.out


def printed_to_users(command: str, folder: str) -> str:
    """The same in a process of its own, with all of the machine's cores, as `make demo` has it."""
    program = [sys.executable, "-m", "lora_cli", *shlex.split(command)[1:]]
    return subprocess.run(program, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def shown(command: str, text: str) -> str:
    """The README's block: of a training's steps and evaluations, the first two and the last."""
    lines = [line.rstrip() for line in text.strip().splitlines()]
    steps = [number for number, line in enumerate(lines) if re.match(r"step \d|after step \d+:", line)]
    if steps:
        lines[steps[2] : steps[-1]] = ["..."]
    return "```\n$ " + command + "\n" + "\n".join(lines) + "\n```"


def masked(block: str) -> list[str]:
    """The lines without figures, units of memory, the widths that they need, and the curve."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "#", block)
    text = re.sub(r"\d[\d.,:]*(e[+-]\d+)?(?<![.,:])( ?[kMG]?B\b)?", "#", text)
    lines = [line for line in text.splitlines() if not re.search("[│└]", line)]
    return [re.sub(r"\s+", " ", line).strip() for line in lines]


def main() -> None:
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name, command in COMMANDS.items():
            parts[name] = shown(command, printed_to_users(command, folder))
    README.write_text(with_parts(README.read_text(encoding="utf-8"), parts), encoding="utf-8")


if __name__ == "__main__":
    main()
