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
from tests.made import base_model, distance, loaded_by_peft, loaded_by_us, logits, seen_in_training, task_of

KINDS = ["llama", "gpt2", "roberta", "mixtral"]
STORAGES = ["none", "nf4", "int8"]
BEGINNINGS = [True, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "eva", "lora_ga", "loftq"]
ON_DENSE_WEIGHTS = ("pissa", "pissa_niter_2", "olora", "lora_ga", "loftq")  # refused by name on a quantized base
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def is_in_the_usual_run(kind: str, storage: str, use_dora: bool, use_rslora: bool, number: int) -> bool:
    """All cells of one architecture with a dense base; elsewhere every beginning once, with DoRA or rsLoRA in turn."""
    return (kind == "llama" and storage == "none") or (use_dora, use_rslora) == (number % 2 == 0, number % 2 == 1)


CELLS = [
    pytest.param(*cell, beginning, marks=[] if is_in_the_usual_run(*cell, number) else pytest.mark.slow)
    for *cell, (number, beginning) in itertools.product(
        KINDS, STORAGES, (False, True), (False, True), enumerate(BEGINNINGS)
    )
    if cell[1] == "none" or beginning not in ON_DENSE_WEIGHTS
]


def cell(
    recipe: Any, model_folder: Any, tmp_path: Path, kind: str, storage: str = "none", **lora: Any
) -> tuple[Path, Path]:
    """A recipe of two steps, and its base."""
    task = task_of(kind)
    base = model_folder(kind, task)
    changes: dict[str, Any] = {f"lora.{key}": value for key, value in lora.items()}
    if task == "sequence_classification":
        rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(16))
        changes |= {"task": task, "dataset.path": str(rows)}
    model = {"path": str(base), "dtype": "float32", "quantization": storage}
    changes |= {"model": model, "training.max_steps": 2, "training.learning_rate": 0.005}
    return recipe(rows=8, **changes), base


@pytest.mark.parametrize(("kind", "storage", "use_dora", "use_rslora", "beginning"), CELLS)
def test_a_cell_trains_goes_on_and_merges(
    kind, storage, use_dora, use_rslora, beginning, recipe, model_folder, tmp_path, lora
):
    variant = {"use_dora": use_dora, "use_rslora": use_rslora, "init_lora_weights": beginning}
    check_cell(*cell(recipe, model_folder, tmp_path, kind, storage, **variant), kind, storage, tmp_path, lora)


@pytest.mark.parametrize("beginning", [True, "gaussian"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_cell_with_stacked_experts(storage, beginning, recipe, model_folder, tmp_path, lora):
    """Beside the attention's layers, and by themselves."""
    variant = {"init_lora_weights": beginning, "target_parameters": EXPERTS, "use_rslora": beginning is True}
    if beginning == "gaussian":
        variant["target_modules"] = []
    check_cell(*cell(recipe, model_folder, tmp_path, "mixtral", storage, **variant), "mixtral", storage, tmp_path, lora)


def check_cell(path: Path, base: Path, kind: str, storage: str, tmp_path: Path, lora: Any) -> None:
    # 1. stopped after the first step and gone on, the same bytes as in one go
    stop_after(path, 1)
    run(path)
    folder = tmp_path / "run"
    interrupted = result_of(folder)
    run(path, fresh=True)
    assert result_of(folder)["adapter_model.safetensors"] == interrupted["adapter_model.safetensors"]
    # 2. ours, PEFT's and the merged model agree, and differ from the base
    task, adapter = task_of(kind), folder / "adapter"
    seen = seen_in_training(adapter, tmp_path / "seen")
    ours, theirs = logits(loaded_by_us(adapter)), logits(loaded_by_peft(seen, adapter, task))
    onto = [] if storage == "none" else ["--onto", "dequantized"]
    merged = lora("merge", adapter, "-o", tmp_path / "merged", "--no-verify", "--json", *onto)
    assert merged.code == 0, merged.err
    scale = float(ours.abs().max())
    assert distance(ours, theirs) < 1e-5 * max(1, scale)
    assert distance(logits(base_model(tmp_path / "merged", task)), ours) < 2e-5 * max(1, scale)
    assert distance(ours, logits(base_model(base, task))) > 1e-3


@pytest.mark.parametrize("beginning", ON_DENSE_WEIGHTS)
@pytest.mark.parametrize("storage", STORAGES[1:])
def test_the_cells_that_are_left_out_are_refused_by_name(storage, beginning, recipe, model_folder, tmp_path, lora):
    path, _ = cell(recipe, model_folder, tmp_path, "llama", storage, init_lora_weights=beginning)
    refused = lora("train", path)
    assert refused.code == 2
    assert beginning in refused.err and storage in refused.err


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
