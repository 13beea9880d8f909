"""``python -m tests.benchmarks.caching [--rounds N]``: what `cache_frozen_layers` brings, epoch by epoch.

A 12-layer model of the 135M shape with adapters on its top three layers. Off, memory and disk take turns,
each in a process of its own; the first epoch fills the cache, the second one lives on it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.bases import save_base
from tests.benchmarks.contenders.job import ROWS_FILE
from tests.benchmarks.shapes import INSTRUCT_135M, Shape

SHAPE = Shape(
    "Llama of 12 layers", INSTRUCT_135M | {"num_hidden_layers": 12, "vocab_size": 8192}, "float32", 4, 64, 512, 7
)
TOP = [9, 10, 11]
EPOCHS = 3


def epochs(base: Path, where: str) -> dict[str, Any]:
    """Tokens a second of each epoch, the last loss, and the peak memory of this process."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from lora_cli.adapters.initialisation import initialise
    from lora_cli.adapters.injection import adapters_of, attach, find_targets, freeze_base
    from lora_cli.commands.caching import cached
    from lora_cli.data.batches import StepPlan
    from lora_cli.data.encoding import Example
    from lora_cli.device import keep_freed_memory, peak_memory_bytes
    from lora_cli.fusion.proof import build_network
    from lora_cli.recipe import LoraSection, Recipe, TrainingSection
    from lora_cli.tasks import CausalLM
    from lora_cli.training.loop import LoopSettings, train_steps
    from lora_cli.training.optimizer import FlatAdamW

    keep_freed_memory()
    rows = [row["ids"] for row in json.loads((base / ROWS_FILE).read_text(encoding="utf-8"))]
    examples = [
        Example(np.array(row, dtype=np.int32), np.arange(len(row)) >= max(1, len(row) // 2), f"row {number}")
        for number, row in enumerate(rows)
    ]
    training = TrainingSection(per_device_train_batch_size=SHAPE.rows_per_step, cache_frozen_layers=where)
    recipe = Recipe.model_validate(
        {"model": {"path": "m"}, "dataset": {"path": ["d"]}, "output_dir": "o", "training": training}
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    attach(model, find_targets(model, LoraSection(r=16, layers_to_transform=TOP), []))
    freeze_base(model, [])
    initialise(adapters_of(model), True, 0)
    model.train()
    cpu, speeds, loss = torch.device("cpu"), [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        network = cached(build_network(model, "causal_lm"), recipe, examples, 0, Path(folder))
        plan = StepPlan(len(examples), SHAPE.rows_per_step, 1, seed=0)
        total = EPOCHS * plan.steps_per_epoch
        settings = LoopSettings(2e-4, "constant", 0, total, 1.0, pad_id=0)
        steps = train_steps(
            network, CausalLM, examples, plan, FlatAdamW(model, training), settings, start=0, device=cpu
        )
        for _ in range(EPOCHS):
            done = [next(steps) for _ in range(plan.steps_per_epoch)]
            speeds.append(sum(step.num_tokens for step in done) / sum(step.seconds for step in done))
            loss = done[-1].loss
    return {"speeds": speeds, "loss": loss, "memory": peak_memory_bytes(cpu)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs=2, metavar=("WHERE", "BASE"), help="one run, its figures as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        sys.stdout.write(json.dumps(epochs(Path(arguments.only[1]), arguments.only[0])) + "\n")
        return
    results: dict[str, list[dict[str, Any]]] = {"none": [], "memory": [], "disk": []}
    with tempfile.TemporaryDirectory() as folder:
        base = save_base(SHAPE, Path(folder))
        for _ in range(arguments.rounds):
            for where, found in results.items():
                command = [sys.executable, "-m", "tests.benchmarks.caching", "--only", where, os.fspath(base)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.append(json.loads(output.splitlines()[-1]))
    for where, found in results.items():
        shown = []
        for epoch in range(EPOCHS):
            speeds = [result["speeds"][epoch] for result in found]
            shown.append(f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})")
        memory = statistics.median(result["memory"] for result in found) / 1e9
        sys.stdout.write(f"{where:<8}tokens/s by epoch: {', '.join(shown)}; ")
        sys.stdout.write(f"peak {memory:.2f} GB; last loss {found[0]['loss']:.6f}\n")


if __name__ == "__main__":
    main()
