"""`lora inspect`: figures of the dense updates, without the base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.adapters.files import read_adapter
from lora_cli.commands.inspect import inspect
from tests.adapters.test_spectrum import dense
from tests.made import our_adapter, peft_adapter, task_of


@pytest.fixture
def adapter(tmp_path, model_folder):
    our_adapter(
        model_folder("llama"),
        tmp_path / "adapter",
        "causal_lm",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 5.0},
    )
    return tmp_path / "adapter"


def edited(folder, edit):
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def test_the_figures_are_those_of_the_dense_updates(adapter, lora):
    found = lora("inspect", adapter, "--json").json
    updates = read_adapter(adapter).updates
    assert [module["name"] for module in found["modules"]] == list(updates)
    for module in found["modules"]:
        update = updates[module["name"]]
        values = torch.linalg.svdvals(dense(update))[: module["rank"]]
        shares = values / values.sum()
        assert module["norm"] == pytest.approx(float(dense(update).norm()), rel=1e-12)
        assert module["effective_rank"] == pytest.approx(float((-shares * shares.log()).sum().exp()), rel=1e-9)
        assert (module["out_features"], module["in_features"]) == tuple(dense(update).shape)
        assert module["state"] == "alive"
    ranks = {module["name"].rpartition(".")[2]: (module["rank"], module["scaling"]) for module in found["modules"]}
    assert ranks["q_proj"] == (2, 4.0)
    assert ranks["v_proj"] == (4, 1.25)
    total = torch.stack([dense(update).norm() for update in updates.values()]).norm()
    assert found["norm"] == pytest.approx(float(total), rel=1e-12)
    assert found["parameters"] == sum(t.numel() for u in updates.values() for t in u.tensors.values())
    assert found["dtypes"] == ["F32"]


def test_the_base_is_named_and_not_read(tmp_path, adapter, lora):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    found = lora("inspect", adapter, "--json").json
    assert found["base"] == str(tmp_path / "gone")
    assert len(found["base_fingerprint"]) == 64


def test_dead_and_broken_modules_are_named(adapter, lora):
    def harm(tensors):
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].zero_()
        tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 0] = float("nan")

    edited(adapter, harm)
    result = lora("inspect", adapter, "--json")
    assert "NaN" not in result.out
    states = {module["name"]: module["state"] for module in result.json["modules"] if module["state"] != "alive"}
    assert states == {"model.layers.0.self_attn.q_proj": "dead", "model.layers.1.mlp.up_proj": "not finite"}
    assert result.json["norm"] is None
    screen = lora("inspect", adapter).out
    assert "dead         model.layers.0.self_attn.q_proj\n" in screen
    assert "not finite   model.layers.1.mlp.up_proj\n" in screen


def test_the_screen_has_a_row_a_kind_and_a_line_a_server(adapter, lora):
    screen = lora("inspect", adapter).out
    assert "model.layers.{0..1}.self_attn.q_proj" in screen
    assert "peft       serves it" in screen
    older = "ignores alpha_pattern, rank_pattern in older versions (0.33 reads them): wrong scale on 4 modules"
    assert f"vllm       misreads: {older}" in screen
    assert "llama.cpp  misreads: ignores alpha_pattern: wrong scale on 2 modules" in screen


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_adapters_of_peft_and_saved_modules(kind, tmp_path, model_folder, lora):
    task = task_of(kind)
    fan = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    peft_adapter(model_folder(kind, task), tmp_path / "adapter", task, r=24, **fan)
    result = lora("inspect", tmp_path / "adapter", "--json")
    found = result.json
    assert result.code == 0, result.err
    assert found["base_fingerprint"] is None
    vllm = next(server for server in found["servers"] if server["server"] == "vllm")
    assert vllm["flags"] == ["--max-lora-rank 32 (16 unless set)"]
    assert bool(found["saved"]) == (kind == "roberta") == bool(vllm["refuses"])


def test_dora_is_named(tmp_path, model_folder, lora):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm", use_dora=True)
    found = lora("inspect", tmp_path / "adapter", "--json").json
    assert found["use_dora"] is True
    assert "refuses: DoRA" in lora("inspect", tmp_path / "adapter").out


def test_an_adapter_compared_with_itself_and_with_another(tmp_path, adapter, model_folder, lora):
    shutil.copytree(adapter, tmp_path / "same")
    same = lora("inspect", adapter, tmp_path / "same", "--json").json["difference"]
    for module in same["modules"]:
        assert module["cosine"] == pytest.approx(1, abs=1e-12)
        assert module["norm_change"] == pytest.approx(0, abs=1e-12)
        assert module["distance"] < 1e-12
    our_adapter(model_folder("llama"), tmp_path / "other", "causal_lm", r=3, target_modules=["q_proj", "o_proj"])
    edited(tmp_path / "other", lambda tensors: [t.mul_(1.5).add_(0.02) for t in tensors.values()])
    found = inspect(adapter, tmp_path / "other").difference
    here, there = read_adapter(adapter).updates, read_adapter(tmp_path / "other").updates
    assert {module.name for module in found.modules} == set(there)
    assert set(found.only_here) == set(here) - set(there)
    for module in found.modules:
        x, y = dense(here[module.name]), dense(there[module.name])
        assert module.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-12)
        assert module.norm_change == pytest.approx(float(y.norm() / x.norm() - 1), rel=1e-9)
        assert module.distance == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-9)
        assert abs(module.cosine) < 0.9
    assert "only in this adapter: " in lora("inspect", adapter, tmp_path / "other").out


def test_modules_of_other_sizes_are_told_and_no_empty_table_is_shown(tmp_path, adapter, model_folder, lora):
    base = model_folder("llama", hidden_size=64)
    our_adapter(base, tmp_path / "wider", "causal_lm")
    told = lora("inspect", adapter, tmp_path / "wider").out
    assert "nothing can be compared: no module has an update of the same shape in both\nof other shapes: model" in told
    assert "cosine" not in told
    assert "cosine" in lora("inspect", adapter, adapter).out


def test_nothing_in_common_is_refused(tmp_path, adapter, model_folder, lora):
    our_adapter(model_folder("gpt2"), tmp_path / "gpt2", "causal_lm")
    result = lora("inspect", adapter, tmp_path / "gpt2")
    assert result.code == 2
    assert "have no module in common" in result.err


def test_a_folder_that_is_no_adapter_is_refused(model_folder, lora):
    assert "holds no adapter_config.json" in lora("inspect", model_folder("llama")).err
