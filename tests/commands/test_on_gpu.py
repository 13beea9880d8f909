"""Whole runs on a CUDA device against the same runs on the CPU. Without a device they are skipped, and say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import labelled_rows, write_jsonl

pytestmark = pytest.mark.gpu

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"model.attn_implementation": "sdpa"},
    "nf4": {"model.quantization": "nf4"},
    "dora": {"lora.use_dora": True, "lora.init_lora_weights": "pissa"},
    "recomputed": {"training.gradient_checkpointing": True},
    "offloaded": {"training.gradient_checkpointing": "offload"},
    "auto": {"training.per_device_train_batch_size": "auto"},
    "upper layer from memory": {"lora.layers_to_transform": [1], "training.cache_frozen_layers": "memory"},
}


def figures(folder: Path) -> list[float]:
    """Losses, gradient norms and evaluations, in their order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("loss", "grad_norm", "eval_loss") if name in line]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_a_language_model_s_run_is_that_of_the_cpu(kind, dtype, limit, recipe, lora, tmp_path):
    changes = KINDS[kind] | {"model.dtype": dtype, "training.max_steps": 4, "dataset.eval_size": 4}
    found = {}
    for use_cpu in (True, False):
        own = {"training.gradient_checkpointing": True} if use_cpu and kind == "offloaded" else {}
        path = recipe(f"{use_cpu}.yaml", output_dir=str(tmp_path / str(use_cpu)), **changes | own)
        result = lora("train", path, f"training.use_cpu={str(use_cpu).lower()}")
        assert result.code == 0, result.err
        assert "not compiled" not in result.out
        found[use_cpu] = figures(tmp_path / str(use_cpu))
    assert found[False] == pytest.approx(found[True], rel=limit)


def test_a_classifier_s_run_is_that_of_the_cpu(recipe, lora, model_folder, tmp_path):
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(12))
    changes = {"model.path": str(model_folder("bert", "sequence_classification")), "task": "sequence_classification"}
    changes |= {"dataset.path": str(rows), "training.max_steps": 3, "model.dtype": "float32"}
    found = []
    for use_cpu in ("true", "false"):
        path = recipe(f"{use_cpu}.yaml", output_dir=str(tmp_path / use_cpu), **changes)
        assert lora("train", path, f"training.use_cpu={use_cpu}").code == 0
        found.append(figures(tmp_path / use_cpu))
    assert found[1] == pytest.approx(found[0], rel=1e-3)
