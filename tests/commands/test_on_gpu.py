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


def test_soft_caps_and_windows_have_kernels_of_their_own(recipe, lora, model_folder, tmp_path):
    """Gemma 2 with rows of more than a block: flex attention in training, its endings and evaluation."""
    rows = write_jsonl(tmp_path / "long.jsonl", [{"text": "rabbit farmer " * 60 + str(number)} for number in range(12)])
    changes = {"model.path": str(model_folder("gemma2")), "model.dtype": "bfloat16", "dataset.path": str(rows)}
    changes |= {"dataset.max_length": 200, "dataset.eval_size": 4, "training.max_steps": 3}
    found = {}
    for use_cpu in (True, False):
        path = recipe(f"{use_cpu}.yaml", output_dir=str(tmp_path / str(use_cpu)), **changes)
        result = lora("train", path, f"training.use_cpu={str(use_cpu).lower()}")
        assert result.code == 0, result.err
        assert "have no kernel of their own" not in result.out
        assert "rows are padded" not in result.out
        found[use_cpu] = figures(tmp_path / str(use_cpu))
    assert found[False] == pytest.approx(found[True], rel=5e-2)


@pytest.mark.parametrize(("kind", "dtype", "limit"), [("bert", "float32", 1e-3), ("modernbert", "bfloat16", 5e-2)])
def test_a_classifier_s_run_is_that_of_the_cpu(kind, dtype, limit, recipe, lora, model_folder, tmp_path):
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(12))
    changes = {"model.path": str(model_folder(kind, "sequence_classification")), "task": "sequence_classification"}
    changes |= {"dataset.path": str(rows), "training.max_steps": 3, "model.dtype": dtype}
    found = []
    for use_cpu in ("true", "false"):
        path = recipe(f"{use_cpu}.yaml", output_dir=str(tmp_path / use_cpu), **changes)
        assert lora("train", path, f"training.use_cpu={use_cpu}").code == 0
        found.append(figures(tmp_path / use_cpu))
    assert found[1] == pytest.approx(found[0], rel=limit)
