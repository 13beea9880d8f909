"""``python -m tests.benchmarks.variants``: every kind of adapter on one task, each at its best learning rate.

The quickstart's pretrained model and rows, one epoch, several seeds. The learning rate is chosen for each kind by the
mean loss on held-out rows, so no kind suffers from another one's. What it says is about a small model and an easy task.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from lora_cli.commands.train import train
from lora_cli.recipe import load_recipe
from lora_cli.report.training import Silence

ROOT = Path(__file__).resolve().parents[2]
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"lora.use_rslora": True},
    "DoRA": {"lora.use_dora": True},
    "LoRA+, ratio 16": {"training.loraplus_lr_ratio": 16},
    **{
        kind: {"lora.init_lora_weights": kind}
        for kind in ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva", "lora_ga")
    },
    "nf4 base": {"model.quantization": "nf4"},
    "int8 base": {"model.quantization": "int8"},
    **{
        f"loftq, {bits} bits": {
            "lora.init_lora_weights": "loftq",
            "lora.loftq_config": {"loftq_bits": bits, "loftq_iter": 5},
        }
        for bits in (4, 3, 2)
    },
    "full": {"method": "full"},
}
RATES = (1e-3, 3e-3, 1e-2)
FULL_RATES = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Result:
    """Of one kind at one learning rate: held-out loss and exact match by seed, and the loss before training."""

    rate: float
    before: float
    losses: list[float]
    matches: list[float]


def measure(kind: str, rate: float, seeds: list[int], folder: Path) -> Result:
    found = [_run(kind, rate, seed, folder / f"{kind}-{rate}-{seed}") for seed in seeds]
    return Result(
        rate,
        mean(summary["before"]["loss"] for summary in found),
        [summary["after"]["loss"] for summary in found],
        [summary["after"]["exact_match"] for summary in found],
    )


def _run(kind: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    changes = {
        "lora": None if kind == "full" else {"r": 4, "target_modules": "all-linear"},
        "model": {"path": str(ROOT / "recipes/quickstart/model"), "dtype": "float32"},
        "dataset.path": str(ROOT / "recipes/quickstart/train.jsonl"),
        "dataset.eval_path": str(ROOT / "recipes/quickstart/heldout.jsonl"),
        "training.num_train_epochs": 1,
        "training.learning_rate": rate,
        "training.seed": seed,
        "training.use_cpu": True,
        "output_dir": str(folder),
    } | KINDS[kind]
    arguments = [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    source = ROOT / "recipes/quickstart.yaml"
    if kind == "full":
        source = folder.with_suffix(".yaml")
        values = yaml.safe_load((ROOT / "recipes/quickstart.yaml").read_text(encoding="utf-8"))
        source.write_text(yaml.safe_dump({key: value for key, value in values.items() if key != "lora"}))
    outcome = train(load_recipe(source, arguments), Silence())
    assert outcome is not None
    return outcome.summary.to_dict()


def row(kind: str, best: Result) -> str:
    losses, matches = best.losses, best.matches
    return (
        f"| {kind} | {best.rate:g} | {best.before:.2f} | {mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f}) | "
        f"{mean(matches):.2f} ({min(matches):.2f}-{max(matches):.2f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.variants", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (all)")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"unknown kind {unknown[0]}; one of {', '.join(KINDS)}")
    print("| kind | learning rate | loss before | loss after | exact match |\n| --- | ---: | ---: | ---: | ---: |")  # noqa: T201
    for kind in options.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            rates = FULL_RATES if kind == "full" else RATES
            found = [measure(kind, rate, list(range(options.seeds)), Path(folder)) for rate in rates]
        print(row(kind, min(found, key=lambda result: mean(result.losses))), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
