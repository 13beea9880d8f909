"""``python -m tests.benchmarks.merging BASE ADAPTER OUTPUT``: `lora merge --no-verify` in a process of its own.

With ``adapter BASE ADAPTER SHAPE`` instead: an adapter on every projection, to be merged.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lora_cli.adapters.configuration import peft_config
from lora_cli.adapters.files import save_adapter, trained_tensors
from lora_cli.commands.merge import merge
from lora_cli.models import load_model, read_config
from lora_cli.recipe import LoraSection
from tests.benchmarks.contenders.ours import adapted
from tests.benchmarks.memory import process_peak_bytes, resident_bytes
from tests.benchmarks.shapes import ALPHA, RANK, SHAPES


def make_adapter(base: Path, adapter: Path, shape: str) -> dict[str, Any]:
    model, _ = load_model(base, read_config(base), "causal_lm", getattr(torch, SHAPES[shape].dtype))
    adapted(model, SHAPES[shape])
    adapter.mkdir()
    lora = LoraSection(r=RANK, lora_alpha=ALPHA)
    config = peft_config(model, lora, "causal_lm", [], base=str(base), revision=None)
    save_adapter(adapter, trained_tensors(model), config)
    return {}


def measure_merge(base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """Seconds and memory without the start of Python; the base's size is what both are held against."""
    before, began = resident_bytes(), time.perf_counter()
    merge(adapter, output, verify=False)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    return {
        "megabytes_per_second": size / 1e6 / seconds,
        "file_bytes": size,
        "peak_bytes": process_peak_bytes(),
        "above_start_bytes": process_peak_bytes() - before,
    }


if __name__ == "__main__":
    if sys.argv[1] == "adapter":
        found = make_adapter(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        found = measure_merge(*map(Path, sys.argv[1:]))
    print(json.dumps(found))  # noqa: T201
