"""Checkpoints: bit for bit what was saved, whole or not taken, and no more of them than asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.adapters.files import trained_tensors
from lora_cli.adapters.initialisation import initialise
from lora_cli.adapters.injection import adapters_of, attach, freeze_base
from lora_cli.adapters.layer import Parametrisation
from lora_cli.adapters.targets import find_targets
from lora_cli.errors import StorageError
from lora_cli.recipe import LoraSection, TrainingSection
from lora_cli.training import checkpoint
from lora_cli.training.checkpoint import Best, Checkpoints, State, read_state, restore
from lora_cli.training.optimizer import FlatAdamW
from tests.conftest import tiny_model

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}


def adapted(seed: int) -> tuple[Any, FlatAdamW]:
    """A model and its optimizer after one step of random gradients."""
    model, lora = tiny_model("llama"), LoraSection(r=2, target_modules=["q_proj"])
    attach(model, find_targets(model, lora, []), Parametrisation(dropout=0.1))
    freeze_base(model, [])
    initialise(adapters_of(model), LoraSection(), seed)
    optimizer = FlatAdamW(model, TrainingSection())
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad.copy_(torch.randn_like(parameter))
    optimizer.update(torch.tensor(True))
    return model, optimizer


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def save(checkpoints: Checkpoints, step: int, best: int | None = None, seed: int = 1) -> Path:
    model, optimizer = adapted(seed)
    state = State(step=step, best=None if best is None else Best(best, 1.0, {"loss": 1.0}))
    checkpoints.save(model, optimizer, state, CONFIG)
    return checkpoints.path(step)


def newest_step(checkpoints: Checkpoints) -> int | None:
    found = checkpoints.newest()
    return found[1].step if found else None


def test_weights_moments_and_generators_come_back_bit_for_bit(checkpoints):
    model, optimizer = adapted(seed=1)
    rng = torch.get_rng_state()
    checkpoints.save(model, optimizer, State(step=3), CONFIG)
    drawn = torch.rand(4)
    other, other_optimizer = adapted(seed=2)
    assert not torch.equal(flat(trained_tensors(other)), flat(trained_tensors(model))), "nothing to restore"
    restore(checkpoints.path(3), other, other_optimizer)
    assert same(trained_tensors(other), trained_tensors(model))
    assert same(other_optimizer.tensors(), optimizer.tensors())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(torch.rand(4), drawn)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_a_baselines_weights_come_back_too(checkpoints):
    model = tiny_model("bert", "sequence_classification")
    optimizer = FlatAdamW(model, TrainingSection())
    checkpoints.save(model, optimizer, State(step=1), None)
    other = tiny_model("bert", "sequence_classification", seed=5)
    assert not same(trained_tensors(other), trained_tensors(model))
    restore(checkpoints.path(1), other, FlatAdamW(other, TrainingSection()))
    assert same(trained_tensors(other), trained_tensors(model))


def test_the_folder_holds_an_adapter_in_pefts_format_the_optimizer_the_state_and_a_manifest(checkpoints):
    folder = save(checkpoints, 120)
    assert folder.name == "step-000120"
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    ]


def test_the_state_survives_its_file(checkpoints):
    state = State(
        step=2,
        tokens=10,
        seconds=0.25,
        evaluated_step=2,
        before={"loss": 3.0},
        best=Best(1, 1.5, {"loss": 1.5}),
        evaluations_without_improvement=1,
        stopped_early=True,
        window={"loss": 0.1},
        metrics_bytes=77,
        run={"lora.r": 2},
    )
    checkpoints.save(*adapted(1), state, CONFIG)
    assert read_state(checkpoints.path(2)) == state


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_makes_the_checkpoint_before_it_the_newest(checkpoints, name, damage):
    save(checkpoints, 1)
    path = save(checkpoints, 2) / name
    assert newest_step(checkpoints) == 2
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()
    if damage != "delete":
        path.write_bytes(raw if damage == "flip" else raw[:-1])
    assert newest_step(checkpoints) == 1


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"state.json": {}}'])
def test_without_a_whole_manifest_a_checkpoint_is_none(checkpoints, text):
    save(checkpoints, 1)
    manifest = save(checkpoints, 2) / "manifest.json"
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    assert newest_step(checkpoints) == 1


def test_no_checkpoint_at_all_is_none(checkpoints):
    assert checkpoints.newest() is None
    assert checkpoints.steps() == []


def test_the_newest_two_are_kept_and_the_best_besides(checkpoints):
    kept = []
    for step, best in [(1, 1), (2, 1), (3, 1), (4, 1), (5, 5), (6, 5)]:
        save(checkpoints, step, best)
        kept.append(checkpoints.steps())
    assert kept == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4, 5], [5, 6]]


def test_numbers_of_seven_digits_are_sorted_as_numbers(checkpoints):
    for step in (999_999, 1_000_000):
        save(checkpoints, step)
    assert checkpoints.steps() == [999_999, 1_000_000]
    assert newest_step(checkpoints) == 1_000_000


def test_damaged_checkpoints_ahead_do_not_push_out_the_one_just_saved(checkpoints):
    for step in (10, 20):
        (save(checkpoints, step) / "state.json").unlink()
    save(checkpoints, 7)
    assert newest_step(checkpoints) == 7
    assert checkpoints.steps() == [7]


def test_a_save_that_fails_half_way_leaves_the_earlier_ones_and_no_litter(checkpoints, monkeypatch):
    save(checkpoints, 1)
    before = {path: path.read_bytes() for path in checkpoints.path(1).iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "rng_tensors", full)
    for step in (1, 2):
        with pytest.raises(StorageError, match="No space left"):
            save(checkpoints, step, seed=2)
    assert {path: path.read_bytes() for path in checkpoints.path(1).iterdir()} == before
    assert [entry.name for entry in checkpoints.folder.iterdir()] == ["step-000001"]


def test_saving_a_step_again_replaces_it(checkpoints):
    first = (save(checkpoints, 1, seed=1) / "adapter_model.safetensors").read_bytes()
    second = (save(checkpoints, 1, seed=2) / "adapter_model.safetensors").read_bytes()
    assert first != second
    assert newest_step(checkpoints) == 1
    assert [entry.name for entry in checkpoints.folder.iterdir()] == ["step-000001"]


def test_the_manifest_counts_every_other_file(checkpoints):
    folder = save(checkpoints, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: entry["size"] for name, entry in manifest.items()} == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"
    }
