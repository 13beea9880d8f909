"""What is not training: merging, counting, tokenizing, starting. Each is ``{row of the table: [unit, values]}``."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.processes import Failed, measured, seconds_of, seconds_to_line
from tests.benchmarks.rounds import measured_base
from tests.benchmarks.shapes import LLAMA_70B

MERGED_SHAPE = "instruct-135m-bfloat16"
NUM_ROWS = 2000
WORDS = "the farmer follows a rabbit over the hill and has seen many birds sing near an old tree by the sea".split()  # noqa: SIM905
Rows = dict[str, Any]


def measure_other(rounds: int, folder: Path, say: Callable[[str], None]) -> Rows:
    """Every row; a text instead of values where a measurement failed."""
    found: Rows = {}
    for measure in (merging, counting, tokenizing, starting):
        say(measure.__name__)
        try:
            found |= measure(rounds, folder)
        except Failed as error:
            found[measure.__name__] = f"failed: {error}"
    return found


def merging(rounds: int, folder: Path, shape: str = MERGED_SHAPE) -> Rows:
    """Folding an adapter into every projection, against a copy of the same file; both are synced to the disk."""
    base, adapter = folder / shape, folder / "adapter"
    measured_base(shape, str(base))
    measured("merging", "adapter", str(base), str(adapter), shape)
    weights, copies, merges = base / "model.safetensors", [], []
    for number in range(rounds):
        target = folder / f"merged-{number}"
        copies.append(weights.stat().st_size / 1e6 / _seconds_to_copy(weights, folder / "copy"))
        merges.append(measured("merging", str(base), str(adapter), str(target)))
        shutil.rmtree(target)
    return {
        "a plain copy of the 135M model's file": ["MB/s", copies],
        "`lora merge --no-verify` of it": ["MB/s", [merge["megabytes_per_second"] for merge in merges]],
        "its peak memory": ["MB", [merge["peak_bytes"] / 1e6 for merge in merges]],
        "its peak memory above that of the imports": ["MB", [merge["above_start_bytes"] / 1e6 for merge in merges]],
        "the file": ["MB", [merges[0]["file_bytes"] / 1e6]],
    }


def _seconds_to_copy(source: Path, target: Path) -> float:
    began = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - began


def counting(rounds: int, folder: Path) -> Rows:
    model = folder / "llama-70b"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
    seconds = [seconds_of("-m", "lora_cli", "count-params", str(model)) for _ in range(rounds)]
    return {"`lora count-params` of Llama-3-70B's shape": ["s", seconds]}


def tokenizing(rounds: int, folder: Path) -> Rows:
    path = folder / "chat.jsonl"
    write_rows(path, NUM_ROWS)
    found = [measured("tokenizing", str(path)) for _ in range(rounds)]
    return {
        f"{NUM_ROWS:,} chat rows to tokens and verified masks": ["rows/s", [one["rows_per_second"] for one in found]],
        "the tokenizer alone on them": ["rows/s", [one["tokenizer_alone_rows_per_second"] for one in found]],
    }


def write_rows(path: Path, count: int) -> None:
    """Dialogues of one to three exchanges, 5 to 40 words a turn."""
    chance = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            turns = [
                {"role": role, "content": " ".join(chance.choices(WORDS, k=chance.randint(5, 40)))}
                for _ in range(chance.randint(1, 3))
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def starting(rounds: int, folder: Path) -> Rows:
    def first_step(number: int) -> float:
        output = f"output_dir={folder / f'smoke-{number}'}"
        return seconds_to_line("step 1/", "-m", "lora_cli", "train", "recipes/smoke.yaml", output)

    return {
        "`python -c pass`": ["s", [seconds_of("-c", "pass") for _ in range(rounds)]],
        "`lora --help`": ["s", [seconds_of("-m", "lora_cli", "--help") for _ in range(rounds)]],
        "`lora train recipes/smoke.yaml` to its first step": ["s", [first_step(number) for number in range(rounds)]],
    }
