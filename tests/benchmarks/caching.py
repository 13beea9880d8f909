"""``python -m tests.benchmarks.caching [--rounds N]``: what `cache_frozen_layers` brings, in the first epoch and later.

A 12-layer model of the 135M shape in float32, adapters on its top three layers. Every optimizer step is made
in each way, one right after the other, so that what else the machine does falls on all of them alike; a round
is an epoch, and ratios are taken within it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.shapes import INSTRUCT_135M

CONFIG = INSTRUCT_135M | {"num_hidden_layers": 12, "vocab_size": 8192}
TOP = [9, 10, 11]
ROWS, ROWS_PER_STEP, SHORTEST, LONGEST = 16, 4, 64, 512
OFF, FIRST, MEMORY, DISK = "off", "on, first epoch", "memory, later epochs", "disk, later epochs"


def examples() -> list[Any]:
    """Rows of random tokens, their second half supervised."""
    import numpy as np

    from lora_cli.data.encoding import Example

    chance, made = random.Random(0), []
    for number in range(ROWS):
        length = chance.randint(SHORTEST, LONGEST)
        ids = np.array([chance.randrange(10, CONFIG["vocab_size"]) for _ in range(length)], dtype=np.int32)
        made.append(Example(ids, np.arange(length) >= length // 2, f"row {number}"))
    return made


def adapted() -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_cli.adapters.initialisation import initialise
    from lora_cli.adapters.injection import adapters_of, attach, freeze_base
    from lora_cli.adapters.targets import find_targets
    from lora_cli.recipe import LoraSection

    torch.manual_seed(0)
    settings = {key: value for key, value in CONFIG.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(CONFIG["model_type"], **settings))
    attach(model, find_targets(model, LoraSection(r=16, layers_to_transform=TOP), []))
    freeze_base(model, [])
    initialise(adapters_of(model), LoraSection(), 0)
    return model.train()


def seconds_of(action: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of this process's own work."""
    clock, work = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - clock, time.process_time() - work


def measure(rounds: int, folder: Path) -> tuple[int, dict[str, list[tuple[float, float]]]]:
    """The tokens of an epoch, and what each round of each way took."""
    import torch

    from lora_cli.data.batches import StepPlan, collate
    from lora_cli.fusion.proof import build_network
    from lora_cli.fusion.skipping import skipping
    from lora_cli.fusion.states import DiskStates, MemoryStates
    from lora_cli.recipe import TrainingSection
    from lora_cli.tasks import CausalLM
    from lora_cli.training.loop import train_step
    from lora_cli.training.optimizer import FlatAdamW

    rows, plan, cpu = examples(), StepPlan(ROWS, ROWS_PER_STEP, 1, seed=0), torch.device("cpu")
    model = adapted()
    network, optimizer = build_network(model, "causal_lm"), FlatAdamW(model, TrainingSection())
    kept = {where: skipping(network, states, rows, ROWS_PER_STEP, 0) for where, states in
            {MEMORY: MemoryStates(), DISK: DiskStates(folder)}.items()}  # fmt: skip
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in (OFF, FIRST, MEMORY, DISK)}

    def epoch(number: int) -> None:
        ways = {OFF: network, FIRST: skipping(network, MemoryStates(), rows, ROWS_PER_STEP, 0)} | kept
        took = dict.fromkeys(ways, (0.0, 0.0))
        for step in range(plan.steps_per_epoch):
            batches = [
                collate(part, 0, network.layout)
                for part in plan.micro_batches(rows, number * plan.steps_per_epoch + step)
            ]
            for way, one in ways.items():
                seconds = seconds_of(lambda one=one, b=batches: train_step(one, CausalLM, b, optimizer, 1.0, cpu))
                took[way] = (took[way][0] + seconds[0], took[way][1] + seconds[1])
        for way, seconds in took.items():
            found[way].append(seconds)

    for number in range(rounds + 1):
        epoch(number)
    for seconds in found.values():
        del seconds[0]  # there the caches were filled, and everything was cold
    return sum(len(row.input_ids) for row in rows), found


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        tokens, found = measure(rounds, Path(folder))
    for way, took in found.items():
        speeds = spread([tokens / clock for clock, _ in took], ",.0f")
        ratios = [off / work for (_, off), (_, work) in zip(found[OFF], took, strict=True)]
        by_clock = [off / clock for (off, _), (clock, _) in zip(found[OFF], took, strict=True)]
        line = (
            f"{way:<22}{speeds} tokens/s; x {spread(by_clock, '.2f')} by the clock, x {spread(ratios, '.2f')} by work"
        )
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
