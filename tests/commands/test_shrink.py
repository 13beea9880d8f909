"""`lora shrink`: a plain PEFT adapter of lower rank, and the figures it reports."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.adapters.files import read_adapter
from tests.adapters.test_spectrum import dense
from tests.commands.test_inspect import edited
from tests.made import base_model, distance, loaded_by_peft, loaded_by_us, logits, our_adapter, peft_adapter, task_of

SAME, DIFFERENT = 1e-5, 1e-2


def shrunk(lora, folder, *options):
    result = lora("shrink", folder, "-o", folder.with_name("small"), "--json", *options)
    assert result.code == 0, result.err
    return result.json


@pytest.mark.parametrize("options", [("--rank", 8), ("--keep-energy", 1.0)])
def test_at_full_rank_the_update_is_kept(options, tmp_path, model_folder, lora):
    """Patterns and rsLoRA become plain alphas; the logits stay."""
    base = model_folder("llama")
    keys = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5.0}}
    model = our_adapter(base, tmp_path / "adapter", "causal_lm", **keys)
    report = shrunk(lora, tmp_path / "adapter", *options)
    before, after = (read_adapter(tmp_path / name).updates for name in ("adapter", "small"))
    for name, update in before.items():
        assert float((dense(after[name]) - dense(update)).abs().max()) < 1e-6
    assert report["energy"] == 1
    assert distance(logits(loaded_by_peft(base, tmp_path / "small", "causal_lm")), logits(model)) < SAME
    assert "use_rslora" not in json.loads((tmp_path / "small" / "adapter_config.json").read_text())


@pytest.mark.parametrize("options", [("--rank", 2), ("--keep-energy", 0.6)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "roberta"])
def test_each_module_is_its_best_approximation_and_peft_reads_it(kind, options, tmp_path, model_folder, lora):
    base, task = model_folder(kind, task_of(kind)), task_of(kind)
    fan = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    peft_adapter(base, tmp_path / "adapter", task, r=6, **fan)
    report = shrunk(lora, tmp_path / "adapter", *options)
    before, after = (read_adapter(tmp_path / name).updates for name in ("adapter", "small"))
    for module in report["modules"]:
        whole, small, n = dense(before[module["name"]]), dense(after[module["name"]]), module["rank"]
        u, values, v = torch.linalg.svd(whole, full_matrices=False)
        assert float((small - u[:, :n] * values[:n] @ v[:n]).abs().max()) < 1e-6
        assert module["energy"] == pytest.approx(float(values[:n].square().sum() / values.square().sum()), abs=1e-9)
        assert module["rank_before"] == 6
    total = sum(float(dense(update).square().sum()) for update in before.values())
    lost = sum(float((dense(before[name]) - dense(after[name])).square().sum()) for name in before)
    assert report["energy"] == pytest.approx(1 - lost / total, abs=1e-6)
    found = logits(loaded_by_peft(base, tmp_path / "small", task))
    assert distance(found, logits(loaded_by_us(tmp_path / "small"))) < SAME
    assert distance(found, logits(loaded_by_us(tmp_path / "adapter"))) > DIFFERENT
    assert distance(found, logits(base_model(base, task))) > DIFFERENT


def test_modules_saved_in_full_and_provenance_are_copied(tmp_path, model_folder, lora):
    base = model_folder("roberta", "sequence_classification")
    our_adapter(base, tmp_path / "adapter", "sequence_classification")
    shrunk(lora, tmp_path / "adapter", "--rank", 1)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "small"))
    saved = [name for name in before if ".classifier." in name]
    assert saved
    assert all(torch.equal(before[name], after[name]) for name in saved)
    texts = [(tmp_path / name / "provenance.json").read_text() for name in ("adapter", "small")]
    assert texts[0] == texts[1]


def test_a_shrunk_adapter_merges(tmp_path, model_folder, lora):
    base = model_folder("llama")
    our_adapter(base, tmp_path / "adapter", "causal_lm", rank_pattern={"re:.*1.*": 2})
    shrunk(lora, tmp_path / "adapter", "--keep-energy", 0.5)
    assert "rank_pattern" in json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    merged = lora("merge", tmp_path / "small", "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    found = logits(base_model(tmp_path / "merged", "causal_lm"))
    assert distance(found, logits(loaded_by_peft(base, tmp_path / "small", "causal_lm"))) < SAME


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "say how far to shrink"),
        (("--rank", 2, "--keep-energy", 0.5), "--rank and --keep-energy cannot both say how far to shrink"),
        (("--rank", 0), "--rank 0 is no rank"),
        (("--keep-energy", 1.5), "--keep-energy 1.5 is no share"),
        (("--keep-energy", 0), "--keep-energy 0.0 is no share"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(options, message, tmp_path, lora):
    result = lora("shrink", tmp_path / "adapter", "-o", tmp_path / "small", *options)
    assert result.code == 2
    assert message in result.err


def test_dora_broken_numbers_and_an_existing_folder_are_refused(tmp_path, model_folder, lora):
    base = model_folder("llama")
    our_adapter(base, tmp_path / "dora", "causal_lm", use_dora=True)
    our_adapter(base, tmp_path / "broken", "causal_lm")
    edited(tmp_path / "broken", lambda tensors: next(iter(tensors.values())).fill_(float("inf")))
    for name, message in (("dora", "its magnitudes belong to the norm"), ("broken", "numbers that are not finite")):
        result = lora("shrink", tmp_path / name, "--rank", 2, "-o", tmp_path / "small")
        assert result.code == 2
        assert message in result.err
        assert not (tmp_path / "small").exists()
    result = lora("shrink", tmp_path / "broken", "--rank", 2, "-o", tmp_path / "dora")
    assert "exists already" in result.err


def test_the_screen_says_ranks_and_energy(tmp_path, model_folder, lora):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    screen = lora("shrink", tmp_path / "adapter", "--rank", 2, "-o", tmp_path / "small").out
    assert "4 to 2" in screen
    assert "energy kept" in screen
