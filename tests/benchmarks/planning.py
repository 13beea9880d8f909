"""``python -m tests.benchmarks.planning [SHAPE ...]``: what `lora check` plans, beside what `lora train` takes.

Every figure comes from a process of its own, through the command line: the plan from ``lora check --json``, the
peak from the system's account of a whole ``lora train``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.shapes import ENCODER, INSTRUCT_135M

ROOT = Path(__file__).resolve().parents[2]
ROWS = 64


@dataclass(frozen=True)
class Shape:
    """A random model, rows of random words, and what the recipe changes."""

    config: dict[str, Any]
    shortest: int
    longest: int
    changes: dict[str, Any] = field(default_factory=dict)
    task: str = "causal_lm"
    prefix: int = 0  # words that all rows begin with, beside their own
    processes: int = 1


def _llama(dtype: str, shortest: int = 64, longest: int = 512, **changes: Any) -> Shape:
    return Shape(INSTRUCT_135M, shortest, longest, {"model.dtype": dtype, **changes})


SHAPES = {
    "135m-bfloat16": _llama("bfloat16"),
    "135m-float32": _llama("float32"),
    "135m-float32-checkpointing": _llama("float32", **{"training.gradient_checkpointing": True}),
    "135m-bfloat16-4x2048": _llama("bfloat16", 2048, 2048, **{"training.max_steps": 1}),
    "135m-bfloat16-dropout": _llama("bfloat16", **{"lora.lora_dropout": 0.05}),
    "135m-bfloat16-dora": _llama("bfloat16", **{"lora.use_dora": True}),
    "135m-bfloat16-nf4": _llama("bfloat16", **{"model.quantization": "nf4"}),
    "135m-bfloat16-evaluated": _llama("bfloat16", **{"dataset.eval_size": 40}),
    "135m-bfloat16-padded": _llama("bfloat16", **{"model.attn_implementation": "sdpa"}),
    "135m-bfloat16-top-10": _llama("bfloat16", **{"lora.layers_to_transform": list(range(20, 30))}),
    "135m-bfloat16-top-10-cached": _llama(
        "bfloat16",
        **{"lora.layers_to_transform": list(range(20, 30)), "training.cache_frozen_layers": "memory"},
    ),
    "135m-bfloat16-prefix": replace(
        _llama("bfloat16", 32, 256, **{"training.per_device_train_batch_size": 8}), prefix=256
    ),
    "135m-bfloat16-fsdp": replace(_llama("bfloat16", **{"training.strategy": "fsdp"}), processes=2),
    "encoder-float32": Shape(
        ENCODER,
        5,
        60,
        {"model.dtype": "float32", "training.per_device_train_batch_size": 32},
        "sequence_classification",
    ),
}
QUICKSTART = "quickstart"  # its first hundred steps


def write_shape(shape: Shape, folder: Path) -> list[str]:
    """The arguments of a command that trains this shape. Runs in a process of its own: torch makes it large."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    auto = AutoModelForCausalLM if shape.task == "causal_lm" else AutoModelForSequenceClassification
    settings = {key: value for key, value in shape.config.items() if key != "model_type"}
    config = AutoConfig.for_model(shape.config["model_type"], **settings)
    model = auto.from_config(config, dtype=getattr(torch, shape.changes["model.dtype"]))
    model.save_pretrained(folder / "model")
    words = {"<eos>": 0, "<pad>": 1} | {f"w{number}": number for number in range(2, config.vocab_size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w2"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder / "model"
    )
    chance = random.Random(0)
    common = _text(shape, chance, shape.prefix)
    rows = [_row(shape, chance, common) for _ in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {"task": shape.task, "model": {"path": str(folder / "model")}}
    recipe |= {"dataset": {"path": str(folder / "rows.jsonl"), "eval_size": 8}, "output_dir": str(folder / "run")}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    changes = {"training.max_steps": 3, "training.use_cpu": True} | shape.changes
    return [str(folder / "recipe.yaml"), *(f"{key}={json.dumps(value)}" for key, value in changes.items())]


def _text(shape: Shape, chance: random.Random, length: int) -> str:
    return "".join(f" w{chance.randrange(10, shape.config['vocab_size'])}" for _ in range(length))


def _row(shape: Shape, chance: random.Random, common: str) -> dict[str, Any]:
    """Half of its own words are supervised; the end of text counts as a token."""
    length = chance.randint(shape.shortest, shape.longest)
    if shape.task == "sequence_classification":
        return {"text": _text(shape, chance, length), "label": chance.randrange(2)}
    prompt = common + _text(shape, chance, length // 2)
    return {"prompt": prompt, "completion": _text(shape, chance, length - length // 2 - 1)}


def run(*command: str) -> tuple[str, int]:
    """(what it prints, the most memory that it or a process of its had, in bytes)."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, command
        out.seek(0)
        return out.read(), usage.ru_maxrss * 1024


def measure(name: str, folder: Path) -> dict[str, Any]:
    if name == QUICKSTART:
        arguments = [
            "recipes/quickstart.yaml",
            f"output_dir={folder / 'run'}",
            "training.use_cpu=true",
            "training.max_steps=100",
        ]
    else:
        arguments = json.loads(run("-m", "tests.benchmarks.planning", "--write", name, str(folder))[0])
    processes = SHAPES[name].processes if name in SHAPES else 1
    options = ["--json", *(["--nproc-per-node", str(processes)] if processes > 1 else [])]
    plan = json.loads(run("-m", "lora_cli", "check", *arguments, *options)[0])["memory"]
    summary, peak = run("-m", "lora_cli", "train", *arguments, *options)
    return {"plan": plan, "peak": peak, "summary": json.loads(summary)["peak_memory_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.planning", description=__doc__)
    parser.add_argument("shapes", nargs="*", default=[*SHAPES, QUICKSTART], metavar="SHAPE")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--write", nargs=2, metavar=("SHAPE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        print(json.dumps(write_shape(SHAPES[options.write[0]], Path(options.write[1]))))  # noqa: T201
        return
    if unknown := [name for name in options.shapes if name not in (*SHAPES, QUICKSTART)]:
        parser.error(f"unknown shape {unknown[0]}; one of {', '.join([*SHAPES, QUICKSTART])}")
    results = {}
    print(f"{'shape':<30}{'plan MB':>9}{'peak MB':>9}{'plan / peak':>12}", flush=True)  # noqa: T201
    for name in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, Path(folder))
        plan, peak = results[name]["plan"]["total"], results[name]["peak"]
        print(f"{name:<30}{plan / 1e6:>9,.0f}{peak / 1e6:>9,.0f}{plan / peak:>12.3f}", flush=True)  # noqa: T201
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
