"""Every variant with every other: each cell trains, stops, goes on, saves, and merges into what it trained.

PEFT reads each adapter too, over the base as it was: whoever trained from somewhere else than zero must not show.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.commands.test_resume import result_of, run, stop_after
from tests.conftest import labelled_rows, write_jsonl
from tests.made import base_model, distance, loaded_by_peft, loaded_by_us, logits, task_of

KINDS = ["llama", "gpt2", "roberta"]
BEGINNINGS = [True, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "eva", "lora_ga"]
CELLS = [
    (kind, use_dora, use_rslora, beginning)
    for kind, use_dora, use_rslora, (number, beginning) in itertools.product(
        KINDS, (False, True), (False, True), enumerate(BEGINNINGS)
    )
    # all of them on one architecture; on the others every beginning once, with DoRA or with rsLoRA in turn
    if kind == "llama" or (use_dora, use_rslora) == (number % 2 == 0, number % 2 == 1)
]


def cell(recipe: Any, model_folder: Any, tmp_path: Path, kind: str, **lora: Any) -> tuple[Path, Path]:
    """A recipe of two steps, and its base."""
    task = task_of(kind)
    base = model_folder(kind, task)
    changes: dict[str, Any] = {f"lora.{key}": value for key, value in lora.items()}
    if task == "sequence_classification":
        rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(16))
        changes |= {"task": task, "dataset.path": str(rows)}
    model = {"path": str(base), "dtype": "float32"}
    changes |= {"model": model, "training.max_steps": 2, "training.learning_rate": 0.005}
    return recipe(rows=8, **changes), base


@pytest.mark.parametrize(("kind", "use_dora", "use_rslora", "beginning"), CELLS)
def test_a_cell_trains_goes_on_and_merges(kind, use_dora, use_rslora, beginning, recipe, model_folder, tmp_path, lora):
    variant = {"use_dora": use_dora, "use_rslora": use_rslora, "init_lora_weights": beginning}
    path, base = cell(recipe, model_folder, tmp_path, kind, **variant)
    # 1. stopped after the first step and gone on, the same bytes as in one go
    stop_after(path, 1)
    run(path)
    folder = tmp_path / "run"
    interrupted = result_of(folder)
    run(path, fresh=True)
    assert result_of(folder)["adapter_model.safetensors"] == interrupted["adapter_model.safetensors"]
    # 2. ours, PEFT's and the merged model agree, and differ from the base
    task = task_of(kind)
    ours, theirs = logits(loaded_by_us(folder / "adapter")), logits(loaded_by_peft(base, folder / "adapter", task))
    merged = lora("merge", folder / "adapter", "-o", tmp_path / "merged", "--no-verify", "--json")
    assert merged.code == 0, merged.err
    scale = float(ours.abs().max())
    assert distance(ours, theirs) < 1e-5 * max(1, scale)
    assert distance(logits(base_model(tmp_path / "merged", task)), ours) < 2e-5 * max(1, scale)
    assert distance(ours, logits(base_model(base, task))) > 1e-3


def adapter_of(path: Path) -> dict[str, Tensor]:
    run(path)
    return load_file(path.parent / "run" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"use_rslora": True}, *({"init_lora_weights": kind} for kind in BEGINNINGS[1:])],
    ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)
def test_every_variant_changes_the_run(change, recipe, model_folder, tmp_path):
    """The control: a key that is read by nothing would leave the adapter as it is."""
    (tmp_path / "other").mkdir()
    plain = adapter_of(cell(recipe, model_folder, tmp_path, "llama")[0])
    changed, _ = cell(recipe, model_folder, tmp_path, "llama", **change)
    changed.write_text(changed.read_text().replace(str(tmp_path / "run"), str(tmp_path / "other" / "run")))
    moved = changed.rename(tmp_path / "other" / "recipe.yaml")
    other = adapter_of(moved)
    assert any(
        name not in plain or tensor.shape != plain[name].shape or not torch.equal(tensor, plain[name])
        for name, tensor in other.items()
    )
