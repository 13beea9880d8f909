"""The adapter as it is delivered: its type, and that it was looked at after it was written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.adapters import files
from lora_cli.adapters.adapter import tensors_of
from lora_cli.adapters.files import save_adapter
from lora_cli.adapters.spectrum import MOST_LOST, changes_nothing, rounding_loss
from lora_cli.commands.output import check_trained
from lora_cli.errors import StorageError
from tests.commands.test_resume import run
from tests.made import our_adapter

MAGNITUDE = "lora_magnitude_vector"


def delivered(lora, path) -> dict[str, torch.Tensor]:
    result = lora("train", path, "--json")
    assert result.code == 0, result.err
    return load_file(path.parent / "run" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("base", "wanted", "expected"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "float16", torch.float16),
    ],
)
def test_save_dtype(base, wanted, expected, recipe, model_folder, tmp_path, lora):
    model = {"path": str(model_folder("llama")), "dtype": base}
    path = recipe(model=model, **{"training.save_dtype": wanted, "training.max_steps": 2})
    tensors = delivered(lora, path)
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
    assert all(torch.equal(tensor, checkpoint[name].to(expected)) for name, tensor in tensors.items())


def test_magnitudes_and_differences_stay_float32(recipe, model_folder, lora):
    model = {"path": str(model_folder("llama")), "dtype": "bfloat16"}
    tensors = delivered(lora, recipe(model=model, **{"lora.use_dora": True, "training.max_steps": 1}))
    assert {name.endswith(MAGNITUDE) for name, t in tensors.items() if t.dtype == torch.float32} == {True}
    assert any(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    path = recipe(model=model, **{"lora.init_lora_weights": "pissa", "training.max_steps": 1, "output_dir": "x"})
    path.write_text(path.read_text().replace("output_dir: x", f"output_dir: {path.parent / 'run2'}"))
    result = lora("train", path, "--json")
    assert result.code == 0, result.err
    written = load_file(path.parent / "run2" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}


def test_a_file_that_is_not_what_was_given_is_a_storage_error(tmp_path, model_folder, monkeypatch):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    adapter = files.read_adapter(tmp_path / "adapter")
    tensors = tensors_of(adapter)
    save_adapter(tmp_path / "adapter", tensors, adapter.config)
    damaged = {name: torch.full_like(t, float("nan")) for name, t in tensors.items()}
    with pytest.raises(StorageError, match=r"was not written as it should be: .* is damaged"):
        save_adapter(tmp_path / "adapter", damaged, adapter.config)
    real = files.save_file
    monkeypatch.setattr(files, "save_file", lambda t, *more, **named: real(dict(list(t.items())[2:]), *more, **named))
    with pytest.raises(StorageError, match=r"was not written as it should be: .* is missing"):
        save_adapter(tmp_path / "adapter", tensors, adapter.config)


def test_an_adapter_that_changes_nothing_is_not_delivered(tmp_path, model_folder):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    updates = files.read_adapter(tmp_path / "adapter").updates
    check_trained(updates)
    nothing = {name: replace(update, lora_B=torch.zeros_like(update.lora_B)) for name, update in updates.items()}
    with pytest.raises(StorageError, match="every update is zero after training"):
        check_trained(nothing)


@pytest.mark.parametrize("beginning", [True, "orthogonal", "pissa", "olora"])
def test_a_beginning_without_a_step_changes_nothing(beginning, recipe, monkeypatch):
    """Also where neither A nor B is zero, or both are told twice: it is the product that counts."""
    monkeypatch.setattr("lora_cli.training.optimizer.FlatAdamW.update", lambda self, finite: None)
    with pytest.raises(StorageError, match="every update is zero after training"):
        run(recipe(**{"lora.init_lora_weights": beginning, "training.max_steps": 1}))


@pytest.mark.parametrize("beginning", [True, "orthogonal", "pissa", "olora"])
def test_the_smallest_step_changes_something(beginning, recipe, tmp_path):
    run(recipe(**{"lora.init_lora_weights": beginning, "training.max_steps": 1, "training.learning_rate": 1e-5}))
    assert not changes_nothing(files.read_adapter(tmp_path / "run" / "adapter").updates)


def test_what_rounding_would_take_is_not_rounded(recipe, model_folder, tmp_path, lora):
    """An update that counts from a start, by itself and in the adapter of a run that goes on from it."""
    model = {"path": str(model_folder("llama")), "dtype": "bfloat16"}
    first = recipe("first.yaml", model=model, **{"lora.init_lora_weights": "pissa", "training.learning_rate": 1e-4})
    delivered(lora, first)
    source = files.read_adapter(tmp_path / "run" / "adapter").updates
    assert rounding_loss(source, torch.bfloat16) > 10 * MOST_LOST
    changes = {"lora": {"init_from": str(tmp_path / "run" / "adapter")}, "training.learning_rate": 1e-6}
    second = recipe("second.yaml", model=model, output_dir=str(tmp_path / "second"), **changes)
    assert lora("train", second, "--json").code == 0
    found = files.read_adapter(tmp_path / "second" / "adapter").updates
    assert {update.lora_A.dtype for update in found.values()} == {torch.float32}
    refused = lora("check", second, "training.save_dtype=bfloat16", f"output_dir={tmp_path / 'third'}")
    assert refused.code == 2
    assert "training.save_dtype bfloat16 would change the updates in lora.init_from by" in refused.err
    exported = lora("export", tmp_path / "run" / "adapter", "--for", "vllm", "-o", tmp_path / "served", "--no-verify")
    assert exported.code == 2
    assert "export with --dtype float32" in exported.err
    assert not (tmp_path / "served").exists()


def test_a_plain_adapter_bears_rounding(tmp_path, model_folder):
    """The control: a few thousandths."""
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    assert 1e-4 < rounding_loss(files.read_adapter(tmp_path / "adapter").updates, torch.bfloat16) < MOST_LOST / 3


def test_eva_s_figures_are_those_of_the_ranks_it_handed_out(recipe, model_folder, tmp_path, lora):
    rows = {"lora.init_lora_weights": "eva", "lora.rank_pattern": {"q_proj": 8}, "training.max_steps": 1}
    result = lora("train", recipe(**rows), "--json")
    assert result.code == 0, result.err
    updates = files.read_adapter(tmp_path / "run" / "adapter").updates
    assert len({update.r for update in updates.values()}) > 2  # the control: handed out anew
    held = sum(update.lora_A.numel() + update.lora_B.numel() for update in updates.values())
    assert result.json["parameters"]["trainable"] == held
