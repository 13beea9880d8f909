"""Runs on a quantized base, through the command line: they learn, resume, merge onto either base, or are refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.adapters.injection import packable_modules, quantize
from lora_cli.adapters.quantized import QuantizedLinear
from lora_cli.adapters.targets import linear_modules
from lora_cli.commands.building import build_model
from lora_cli.commands.memory import MemoryPlanner
from lora_cli.commands.plan import make_plan
from lora_cli.models import load_model, read_config
from lora_cli.ops.packing import library
from lora_cli.recipe import load_recipe
from tests.commands.test_resume import BUSY, metrics_of, result_of, run, stop_after
from tests.conftest import labelled_rows, write_jsonl
from tests.made import base_model, distance, loaded_by_us, logits

KINDS = ["nf4", "int8"]
FAMILIES = [("llama", "causal_lm"), ("gpt2", "causal_lm"), ("roberta", "sequence_classification")]
TOLD_BY_OTHERS = {("gpt2", "int8"), ("roberta", "nf4")}  # each format and each family is there without them
SAME, DIFFERENT = 2e-5, 1e-3


@pytest.fixture
def quantized(recipe, model_folder, tmp_path):
    """``quantized("nf4", "gpt2", "causal_lm")`` writes the recipe of a short run on such a base."""

    def write(kind="nf4", family="llama", task="causal_lm", **changes):
        base = {"path": str(model_folder(family, task)), "dtype": "float32", "quantization": kind}
        values = {"task": task, "model": base, "dataset.eval_size": 4}
        if task == "sequence_classification":
            values["dataset.path"] = str(write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(16)))
        return recipe(**(values | changes))

    return write


def losses(root: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(root) if "loss" in line]


def adapter_of(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "adapter" / "adapter_model.safetensors")


def dequantized_copy(base: Path, folder: Path, task: str, kind: str) -> Path:
    """A dense base whose weights are those that a run on the quantized one computes with."""
    shutil.copytree(base, folder)
    model, packed = base_model(base, task), load_model(base, read_config(base), task, torch.float32)[0]
    quantize(packed, packable_modules(packed, ["classifier"]), kind)
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            weight_OI = module.unpack(module.weight, torch.float32)
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(weight_OI.T if module.transposed else weight_OI)
    model.save_pretrained(folder)
    return folder


BOTH_WAYS = [
    pytest.param(kind, *family, marks=[] if (family[0], kind) not in TOLD_BY_OTHERS else pytest.mark.slow)
    for family in FAMILIES
    for kind in KINDS
]


@pytest.mark.parametrize(("kind", "family", "task"), BOTH_WAYS)
def test_a_run_is_that_on_the_dequantized_weights_and_merges_both_ways(
    kind, family, task, quantized, model_folder, lora, tmp_path
):
    # 1. it learns, and does what a dense run on the unpacked weights does
    path = quantized(kind, family, task, **{"training.max_steps": 6})
    done = lora("train", path, "--json")
    assert done.code == 0, done.err
    root = tmp_path / "run"
    found = losses(root)
    assert done.json["after"]["loss"] < done.json["before"]["loss"]
    dense = dequantized_copy(model_folder(family, task), tmp_path / "dense", task, kind)
    options = ["model.quantization=none", f"model.path={dense}", f"output_dir={tmp_path / 'twin'}"]
    assert lora("train", path, *options).code == 0
    assert found == pytest.approx(losses(tmp_path / "twin"), rel=1e-5)
    options = ["model.quantization=none", f"output_dir={tmp_path / 'unpacked'}"]
    assert lora("train", path, *options).code == 0
    assert abs(found[0] - losses(tmp_path / "unpacked")[0]) > 1e-6, "the full base is another one"
    # 2. what it leaves is plain, and says what it was trained on
    provenance = json.loads((root / "adapter" / "provenance.json").read_text())
    assert (provenance["quantization"], provenance["quantized_from"]) == (kind, "float32")
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    twin = json.loads((tmp_path / "twin" / "adapter" / "adapter_config.json").read_text())
    assert config | {"base_model_name_or_path": ""} == twin | {"base_model_name_or_path": ""}
    # 3. merged onto what it saw, it is what was trained; onto the full base, the adapter on that
    trained = logits(loaded_by_us(root / "adapter"))
    reports = {}
    for onto in ("full", "dequantized"):
        merged = lora("merge", root / "adapter", "-o", tmp_path / onto, "--onto", onto, "--json")
        assert merged.code == 0, merged.err
        reports[onto] = merged.json
    by_onto = {onto: logits(base_model(tmp_path / onto, task)) for onto in reports}
    assert distance(by_onto["dequantized"], trained) < SAME
    assert distance(by_onto["full"], trained) > DIFFERENT
    assert distance(by_onto["full"], logits(loaded_by_us(root / "adapter", dense=True))) < SAME
    # 4. each report judges its own base, and tells of the trained model both ways
    for report in reports.values():
        assert report["within_limit"] is True
        assert report["agreement"]["max_abs_difference"] < SAME
        assert report["quantization"] == kind
    full, dequantized = reports["full"], reports["dequantized"]
    assert dequantized["trained_agreement"] == dequantized["agreement"]
    assert full["trained_agreement"] == pytest.approx(dequantized["other_way_agreement"], rel=1e-3)
    assert full["trained_agreement"]["mean_kl"] > 100 * abs(full["other_way_agreement"]["mean_kl"])


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_it_ends_in_the_same_bytes(kind, quantized, tmp_path):
    changes = {key: value for key, value in BUSY.items() if key != "dataset.eval_size"}
    reference = run(quantized(kind, name="straight.yaml", output_dir=str(tmp_path / "straight"), **changes)).output.root
    path = quantized(kind, **changes)
    for step in (1, 4):
        stop_after(path, step)
    folder = run(path).output.root
    assert result_of(folder) == result_of(reference)
    assert metrics_of(folder) == metrics_of(reference)


def test_a_run_goes_on_with_the_base_stored_as_it_began(quantized, lora):
    path = quantized("nf4")
    stop_after(path, 2)
    refused = lora("train", path, "model.quantization=int8")
    assert refused.code == 2
    assert 'model.quantization was "nf4" when this run began, and is "int8"' in refused.err


def test_merging_in_bfloat16_onto_what_a_bfloat16_run_saw(quantized, lora, tmp_path):
    """The file is float32, the run computed in bfloat16: packed from that, and merged onto that."""
    assert lora("train", quantized("nf4"), "model.dtype=bfloat16").code == 0
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "provenance.json").read_text())["quantized_from"] == "bfloat16"
    plain = lora("merge", adapter, "-o", tmp_path / "plain", "--onto", "dequantized", "--json").json
    assert plain["within_limit"] is True
    assert plain["agreement"]["mean_kl"] < 1e-9
    rounded = lora("merge", adapter, "-o", tmp_path / "rounded", "--dtype", "bfloat16", "--json").json
    assert 0 < rounded["agreement"]["mean_kl"] <= rounded["limit_mean_kl"]
    assert rounded["other_way_agreement"]["mean_kl"] > plain["agreement"]["mean_kl"], "rounded as the merge is"


def test_the_screen_tells_of_both_ways(quantized, lora, tmp_path):
    assert lora("train", quantized("nf4")).code == 0
    shown = lora("merge", tmp_path / "run" / "adapter", "-o", tmp_path / "merged").out
    assert "the full base; trained on nf4" in shown
    assert "nf4 base + adapter: mean KL" in shown
    assert "with --onto dequantized: mean KL" in shown


@pytest.mark.parametrize("onto", ["full", "dequantized"])
def test_a_wrong_scale_is_caught_whichever_the_base(onto, quantized, lora, tmp_path, monkeypatch):
    from lora_cli.adapters import merging

    right = merging.fold
    assert lora("train", quantized("nf4")).code == 0
    monkeypatch.setattr(merging, "fold", lambda w, a, b, scaling, *more: right(w, a, b, 1.1 * scaling, *more))
    refused = lora("merge", tmp_path / "run" / "adapter", "-o", tmp_path / "merged", "--onto", onto)
    assert refused.code == 5
    assert "the merged model is not the trained one" in refused.err or "part of what was trained" in refused.err
    assert not (tmp_path / "merged").exists()


def test_dequantized_is_refused_for_an_adapter_of_a_dense_base(recipe, lora, tmp_path):
    assert lora("train", recipe()).code == 0
    adapter = tmp_path / "run" / "adapter"
    refused = lora("merge", adapter, "-o", tmp_path / "merged", "--onto", "dequantized")
    assert refused.code == 2
    assert "is for adapters trained on a quantized base" in refused.err
    report = lora("merge", adapter, "-o", tmp_path / "merged", "--json").json
    assert (report["quantization"], report["trained_agreement"], report["other_way_agreement"]) == (None, None, None)
    assert lora("merge", adapter, "--onto", "nf4").code == 2


def test_a_provenance_with_a_format_of_another_version_is_refused(quantized, lora, tmp_path):
    assert lora("train", quantized("nf4")).code == 0
    path = tmp_path / "run" / "adapter" / "provenance.json"
    path.write_text(path.read_text().replace('"nf4"', '"nf9"'))
    refused = lora("merge", tmp_path / "run" / "adapter", "-o", tmp_path / "merged")
    assert refused.code == 2
    assert "names a base quantized to nf9 from float32: not known here" in refused.err


SAME_NUMBERS = {
    "recomputed": ["training.gradient_checkpointing=true"],
    "every second layer": ["training.gradient_checkpointing=selective"],
    "skipped layers": ["training.cache_frozen_layers=memory"],
}


@pytest.mark.parametrize("how", SAME_NUMBERS)
def test_ways_to_run_a_model_that_change_no_number(how, quantized, lora, tmp_path):
    path = quantized("nf4", **{"lora.layers_to_transform": [1]})
    assert lora("train", path, f"output_dir={tmp_path / 'plain'}").code == 0
    done = lora("train", path, *SAME_NUMBERS[how])
    assert done.code == 0, done.err
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


VARIANTS = {
    "DoRA": ["lora.use_dora=true"],
    "DoRA with dropout": ["lora.use_dora=true", "lora.lora_dropout=0.1"],
    "EVA": ["lora.init_lora_weights=eva"],
    "orthogonal": ["lora.init_lora_weights=orthogonal"],
    "a part in full": ["lora.modules_to_save=[model.layers.0.mlp]"],
    "eager": ["model.attn_implementation=eager"],
    "in bfloat16": ["model.dtype=bfloat16"],
    "in float16": ["model.dtype=float16"],
    "auto": ["training.per_device_train_batch_size=auto"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_learn_and_merge_onto_what_they_saw(variant, quantized, lora, tmp_path):
    done = lora("train", quantized("nf4", **{"training.max_steps": 6}), *VARIANTS[variant], "--json")
    assert done.code == 0, done.err
    assert done.json["after"]["loss"] < done.json["before"]["loss"]
    options = ["-o", tmp_path / "merged", "--onto", "dequantized", "--json"]
    merged = lora("merge", tmp_path / "run" / "adapter", *options)
    assert merged.code == 0, merged.err
    assert merged.json["agreement"]["mean_kl"] < 1e-8


def test_a_random_model_is_quantized_too(quantized, lora, model_folder, tmp_path):
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    model = {"config": config, "tokenizer": str(model_folder("llama")), "quantization": "nf4", "dtype": "float32"}
    assert lora("train", quantized(model=model)).code == 0
    assert lora("merge", tmp_path / "run" / "adapter", "-o", tmp_path / "m", "--onto", "dequantized").code == 0


# Plans


def test_the_memory_plan_counts_packed_bytes_and_they_are_those_of_the_model(quantized, model_folder):
    plans = {}
    for changes in (["model.quantization=none"], []):
        plan = make_plan(load_recipe(quantized("nf4"), ["model.dtype=bfloat16", *changes]))
        plans[plan.recipe.model.quantization] = plan
    dense, packed = (MemoryPlanner(plans[kind]).memory() for kind in ("none", "nf4"))
    model = build_model(plans["nf4"], Path(model_folder("llama")))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert packed.weights == sum(tensor.nbytes for tensor in (*frozen, *model.buffers()))
    linear = sum(2 * m.in_features * m.out_features for m in linear_modules(model).values())
    assert dense.weights - packed.weights >= 0.70 * linear > 0
    assert packed.loading - packed.process >= dense.weights, "the dense base is read first"
    assert (packed.adapters, packed.optimizer) == (dense.adapters, dense.optimizer)
    assert packed.activations == pytest.approx(dense.activations, rel=0.01)


def test_checking_and_counting_count_parameters_and_not_bytes(quantized, lora):
    path = quantized("nf4")
    counts = [lora("count-params", path, f"model.quantization={kind}", "--json").json for kind in ("none", "nf4")]
    assert counts[0] == counts[1]
    checked = {kind: lora("check", path, f"model.quantization={kind}", "--json").json for kind in ("none", "nf4")}
    assert checked["nf4"]["quantization"] == "nf4"
    assert checked["nf4"]["parameters"] == checked["none"]["parameters"]
    assert checked["nf4"]["memory"]["weights"] < checked["none"]["memory"]["weights"]
    assert "nf4, computing in float32 on cpu" in lora("check", path).out


# Refusals


@pytest.mark.parametrize("arguments", [["check"], ["train"]])
def test_without_bitsandbytes_one_line_says_what_to_install(arguments, quantized, lora, monkeypatch, tmp_path):
    path = quantized("nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    library.cache_clear()
    try:
        refused = lora(*arguments, path)
        assert lora("check", path, "model.quantization=none").code == 0
    finally:
        library.cache_clear()
    assert refused.code == 2
    assert refused.err == (
        "error: a quantized base needs bitsandbytes, which is not installed\n    help: pip install 'lora-cli[quant]'\n"
    )


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit", "quantization_bit"])
def test_keys_of_other_tools_point_to_ours(key, recipe, lora):
    refused = lora("check", recipe(), f"model.{key}=4")
    assert refused.code == 2
    assert "write model.quantization: " in refused.err


def test_a_base_that_is_stored_quantized_is_refused_with_the_way_out(quantized, lora, model_folder, tmp_path):
    folder = tmp_path / "stored"
    shutil.copytree(model_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    refused = lora("check", quantized("nf4"), f"model.path={folder}")
    assert refused.code == 2
    assert "is stored quantized, and only bases that this tool quantizes itself can be trained on" in refused.err
    assert os.fspath(folder) in refused.err


def test_an_apple_gpu_is_refused(quantized, lora, monkeypatch):
    from lora_cli.commands import plan

    monkeypatch.setattr(plan, "choose_device", lambda use_cpu: torch.device("mps"))
    refused = lora("check", quantized("nf4"))
    assert refused.code == 2
    assert "nf4 works on CUDA and on the CPU, not on mps" in refused.err
