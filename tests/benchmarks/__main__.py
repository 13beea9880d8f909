"""``python -m tests.benchmarks [SHAPE ...] [--rounds N] [--json FILE]``: everything interleaved, medians and spread."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_cli.report.console import make_console, table
from tests.benchmarks.shapes import SHAPES, save_base

LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "architectures": ["LlamaForCausalLM"],
}
NEEDS = {"peft+trainer": ("peft", "accelerate")}


def contenders() -> list[str]:
    """Ours, and each peer that is installed."""
    return ["lora", *(name for name, modules in NEEDS.items() if all(find_spec(m) for m in modules))]


def run(*command: str) -> str:
    return subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout


def training(shape: str, rounds: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Every contender in turn, round after round, each in a fresh process."""
    base = save_base(SHAPES[shape], folder / shape)
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in contenders()}
    for _ in range(rounds):
        for name in figures:
            result = json.loads(run("-m", "tests.benchmarks.contender", name, shape, str(base)).splitlines()[-1])
            for key, value in result.items():
                figures[name].setdefault(key, []).append(value)
    return figures


def seconds(action: Callable[[], object], rounds: int) -> list[float]:
    measured = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        measured.append(time.perf_counter() - began)
    return measured


def start_up(rounds: int) -> dict[str, list[float]]:
    return {
        "python -c pass": seconds(lambda: run("-c", "pass"), rounds),
        "lora --help": seconds(lambda: run("-m", "lora_cli", "--help"), rounds),
    }


def counting(rounds: int, folder: Path) -> list[float]:
    model = folder / "llama-70b"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_70B), encoding="utf-8")
    return seconds(lambda: run("-m", "lora_cli", "count-params", str(model)), rounds)


def merging(shape: str, rounds: int, folder: Path) -> dict[str, list[float]]:
    """MB/s of folding an adapter into every projection, against a plain copy of the same file."""
    import torch

    from lora_cli.adapters.files import peft_config, save_adapter, trained_tensors
    from lora_cli.adapters.initialisation import initialise
    from lora_cli.adapters.injection import adapters_of, attach, find_targets, freeze_base
    from lora_cli.commands.merge import merge
    from lora_cli.models import load_model, read_config
    from lora_cli.recipe import LoraSection

    base, adapter, lora = folder / shape, folder / "adapter", LoraSection(r=16, lora_alpha=32)
    model, _ = load_model(base, read_config(base), "causal_lm", getattr(torch, SHAPES[shape].dtype))
    attach(model, find_targets(model, lora, []))
    freeze_base(model, [])
    initialise(adapters_of(model), True, 0)
    adapter.mkdir()
    save_adapter(
        adapter, trained_tensors(model), peft_config(model, lora, "causal_lm", [], base=str(base), revision=None)
    )
    megabytes = (base / "model.safetensors").stat().st_size / 1e6
    rates: dict[str, list[float]] = {"plain copy": [], "lora merge --no-verify": []}
    for number in range(rounds):
        target = folder / f"merged-{number}"
        copied = seconds(lambda: shutil.copyfile(base / "model.safetensors", folder / "copy"), 1)[0]
        merged = seconds(lambda target=target: merge(adapter, target, verify=False), 1)[0]
        rates["plain copy"].append(megabytes / copied)
        rates["lora merge --no-verify"].append(megabytes / merged)
    return rates


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def show_training(console: Console, shape: str, figures: dict[str, dict[str, list[float]]]) -> None:
    made = table(shape, "tokens/s", "peak GB", "speed ratio", right=(1, 2, 3))
    ours = figures["lora"]["tokens_per_second"]
    for name, values in figures.items():
        ratios = [mine / theirs for mine, theirs in zip(ours, values["tokens_per_second"], strict=True)]
        made.add_row(
            name,
            spread(values["tokens_per_second"], 0),
            spread([peak / 1e9 for peak in values["peak_bytes"]]),
            "" if name == "lora" else f"lora is {spread(ratios)} x",
        )
    console.print(made)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["small-float32", "instruct-135m-bfloat16"], metavar="SHAPE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    console = make_console()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        console.print(f"{options.rounds} rounds; median (least-most); contenders: {', '.join(contenders())}\n")
        for shape in options.shapes:
            results[shape] = training(shape, options.rounds, folder)
            show_training(console, shape, results[shape])
        results["merge"] = merging(options.shapes[-1], options.rounds, folder)
        results["start_up"] = start_up(options.rounds)
        results["count_params_70b"] = {"lora count-params, Llama-3-70B's shape": counting(options.rounds, folder)}
    made = table("other", "median (least-most)", right=(1,))
    for what, values in results["merge"].items():
        made.add_row(f"{what}, MB/s", spread(values, 0))
    for what, values in {**results["start_up"], **results["count_params_70b"]}.items():
        made.add_row(f"{what}, s", spread(values))
    console.print(made)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
