"""LoftQ through the command line: the backbone that training saw is kept, read by others, and merged onto."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_cli.adapters.loftq import KINDS
from lora_cli.adapters.quantized import QuantizedLinear
from lora_cli.commands.building import build_model
from lora_cli.commands.memory import MemoryPlanner
from lora_cli.commands.output import adapter_config
from lora_cli.commands.plan import make_plan
from lora_cli.errors import UsageError
from lora_cli.recipe import load_recipe
from lora_cli.weights import packed_weights
from tests.commands.test_resume import BUSY, result_of, run, stop_after
from tests.conftest import tiny_model
from tests.made import base_model, distance, loaded_by_us, logits, other_weights

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes' CPU code needs whole blocks in each row
WIDE = {"tie_word_embeddings": False, **SIZES}


@pytest.fixture
def loftq(recipe, model_folder):
    """``loftq(bits=2)`` writes the recipe of a short run."""

    def write(bits: int = 4, turns: int = 1, base: Path | None = None, **changes):
        model = {"path": str(base or model_folder("llama", **WIDE)), "dtype": "float32"}
        config = {"loftq_bits": bits, "loftq_iter": turns}
        settings = {"r": 4, "init_lora_weights": "loftq", "loftq_config": config}
        return recipe(**({"model": model, "lora": settings, "dataset.eval_size": 4} | changes))

    return write


@pytest.mark.parametrize("bits", KINDS)
def test_a_run_keeps_what_it_saw_and_merges_onto_it(bits, loftq, lora, tmp_path):
    done = lora("train", loftq(bits, turns=2), "--json")
    assert done.code == 0, done.err
    root = tmp_path / "run"
    # 1. the report: below plain quantization's error, everywhere
    report = json.loads((root / "backbone" / "loftq.json").read_text())
    assert (report["bits"], report["iterations"], len(report["errors"])) == (bits, 2, 14)
    assert all(0 < error["loftq"] < error["plain"] for error in report["errors"].values())
    assert done.json["loftq"]["error"] < done.json["loftq"]["plain_error"]
    assert done.json["loftq"]["largest_share_of_plain"] < 1
    # 2. the adapter is a plain one of the backbone
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(root / "backbone")
    assert "init_lora_weights" not in config and "loftq_config" not in config
    # 3. merged: what was trained, as a dense model that others read
    merged = lora("merge", root / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["within_limit"]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), logits(loaded_by_us(root / "adapter"))) < 2e-5


@pytest.mark.parametrize(("bits", "dequantize"), [(4, "four"), (8, "eight")])
def test_transformers_and_peft_read_the_backbone(bits, dequantize, loftq, model_folder, lora, tmp_path):
    """Weight for weight; the logits of four bits too, where bitsandbytes multiplies with the unpacked weight."""
    targets = {"lora.target_modules": ["q_proj", "up_proj"]} if bits == 4 else {}
    assert lora("train", loftq(bits, **targets), "--json").code == 0
    root = tmp_path / "run"
    read = AutoModelForCausalLM.from_pretrained(root / "backbone", dtype=torch.float32)
    packed = packed_weights(root / "backbone", lambda name: name)
    for name, ours in packed.items():
        theirs = read.get_parameter(name)
        weight = dequantize_4bit(theirs.data, theirs.quant_state) if bits == 4 else None
        weight = int8_vectorwise_dequant(theirs.data, theirs.SCB) if weight is None else weight
        assert torch.equal(weight, ours.weight())
    if bits == 4:
        assert len(packed) == 4
        assert type(read.model.layers[0].mlp.down_proj) is torch.nn.Linear, "what is not adapted stays dense"
        model = peft.PeftModel.from_pretrained(read, root / "adapter").train()
        with torch.no_grad():
            theirs = model(input_ids=torch.arange(20)[None]).logits
            ours = loaded_by_us(root / "adapter")(input_ids=torch.arange(20)[None]).logits
        assert distance(theirs, ours) < 1e-4
    start = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(root / "backbone"), root / "backbone", subfolder="loftq_init"
    )
    began = {name for name, _ in start.named_parameters() if "lora_" in name}
    assert len(began) == 2 * len(packed)


def test_two_bits_are_refused_by_transformers_and_not_misread(loftq, lora, tmp_path):
    assert lora("train", loftq(2), "--json").code == 0
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "backbone")


def test_it_begins_nearer_to_the_base_than_nf4_does(loftq, model_folder, lora, tmp_path):
    """What the factors make up for is what counts: the logits before the first step."""
    base = logits(tiny_model("llama", **WIDE))
    off = {}
    for name, changes in {
        "loftq": {},
        "five turns": {"lora.loftq_config": {"loftq_iter": 5}},
        "nf4": {"lora": {"r": 4}, "model": {"quantization": "nf4", "path": str(model_folder("llama", **WIDE))}},
    }.items():
        changes = {
            "training.learning_rate": 1e-12,
            "training.max_steps": 1,
            "output_dir": str(tmp_path / name),
        } | changes
        changes.setdefault("model", {"path": str(model_folder("llama", **WIDE))})["dtype"] = "float32"
        plan = make_plan(load_recipe(loftq(**changes)))
        if name == "nf4":
            model = build_model(plan, model_folder("llama", **WIDE))
        else:
            run(loftq(**changes))
            model = loaded_by_us(tmp_path / name / "adapter")
        off[name] = float((logits(model) - base).square().mean().sqrt())
    assert off["five turns"] < off["loftq"] < 0.95 * off["nf4"]


def test_stopped_and_gone_on_it_ends_in_the_same_bytes(loftq, tmp_path):
    path = loftq(turns=2, **BUSY)
    stop_after(path, 3)
    backbone = (tmp_path / "run" / "backbone" / "model.safetensors").read_bytes()
    run(path)
    assert (tmp_path / "run" / "backbone" / "model.safetensors").read_bytes() == backbone
    interrupted = result_of(tmp_path / "run")
    run(path, fresh=True)
    assert result_of(tmp_path / "run") == interrupted


def test_a_backbone_that_was_lost_is_not_made_again_for_old_checkpoints(loftq, lora, tmp_path):
    path = loftq(**BUSY)
    stop_after(path, 3)
    file = tmp_path / "run" / "backbone" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, file)
    refused = lora("train", path)
    assert refused.code == 5
    assert "backbone is damaged or gone, and this run's adapter belongs to it" in refused.err
    assert "--fresh" in refused.err
    assert lora("train", path, "--fresh", "--json").code == 0


def test_killed_before_the_first_checkpoint_it_is_made_anew(loftq, lora, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").write_text("")
    (tmp_path / "run" / "backbone").mkdir()
    (tmp_path / "run" / "backbone" / "config.json").write_text("of another recipe")
    assert lora("train", loftq(), "--json").code == 0


def test_training_really_uses_the_packed_layers(loftq, tmp_path):
    path = loftq(**{"training.max_steps": 1})
    run(path)
    model = build_model(make_plan(load_recipe(path)), tmp_path / "run" / "backbone")
    stored = packed_weights(tmp_path / "run" / "backbone", lambda name: name.removesuffix(".weight"))
    layers = {name.removesuffix(".base"): m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers.keys() == stored.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.weight, stored[name].parts[0])


def test_another_adapter_can_go_on_from_it(loftq, recipe, lora, tmp_path):
    assert lora("train", loftq(), "--json").code == 0
    first = tmp_path / "run"
    changes = {"lora": {"init_from": str(first / "adapter")}, "output_dir": str(tmp_path / "second")}
    path = recipe("second.yaml", model={"path": str(first / "backbone"), "dtype": "float32"}, **changes)
    done = lora("train", path, "--json")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "second" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(first / "backbone")
    merged = lora("merge", tmp_path / "second" / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.json["within_limit"]
    seen = logits(loaded_by_us(tmp_path / "second" / "adapter"))
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), seen) < 2e-5
    assert distance(seen, logits(loaded_by_us(first / "adapter"))) > 1e-4


@pytest.mark.parametrize(("bits", "server"), [(2, "vllm"), (8, "sglang"), (4, "llama.cpp"), (3, "peft")])
def test_servers_that_cannot_read_the_backbone_are_told(bits, server, loftq, lora, tmp_path):
    assert lora("train", loftq(bits), "--json").code == 0
    refused = lora("export", tmp_path / "run" / "adapter", "--for", server, "-o", tmp_path / "out")
    assert refused.code == 2
    assert f"{server} does not read" in refused.err
    assert f"its base, quantized to {bits} bits" in refused.err
    assert "lora merge" in refused.err


def test_export_of_four_bits_is_compared_over_the_backbone(loftq, lora, tmp_path):
    assert lora("train", loftq(), "--json").code == 0
    options = ["--for", "vllm", "--dtype", "float32", "-o", tmp_path / "out", "--json"]
    done = lora("export", tmp_path / "run" / "adapter", *options)
    assert done.code == 0, done.err
    assert done.json["agreement"]["max_abs_difference"] < 1e-5
    assert str(tmp_path / "run" / "backbone") in done.json["commands"][0]
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "quantized to 4 bits by LoftQ" in card
    assert f'from_pretrained("{tmp_path / "run" / "backbone"}")' in card


def test_the_base_that_it_was_made_from_is_not_its_base(loftq, model_folder, lora, tmp_path):
    assert lora("train", loftq(), "--json").code == 0
    refused = lora("merge", tmp_path / "run" / "adapter", "--base", model_folder("llama", **WIDE))
    assert refused.code == 2
    assert "is not the base that" in refused.err


def test_a_base_in_shards(recipe, tokenizer, lora, tmp_path):
    """With an index; GPT-2's transposed weights, dropout and DoRA besides."""
    sharded = tmp_path / "sharded"
    tiny_model("gpt2").save_pretrained(sharded, max_shard_size="60KB")
    tokenizer.save_pretrained(sharded)
    settings = {"r": 4, "init_lora_weights": "loftq", "use_dora": True, "lora_dropout": 0.1}
    path = recipe(model={"path": str(sharded), "dtype": "float32"}, lora=settings)
    done = lora("train", path, "--json")
    assert done.code == 0, done.err
    backbone = tmp_path / "run" / "backbone"
    index = json.loads((backbone / "model.safetensors.index.json").read_text())["weight_map"]
    held = {name: file.name for file in backbone.glob("*.safetensors") for name in load_file(file)}
    assert index == held
    assert len(set(index.values())) > 1
    merged = lora("merge", tmp_path / "run" / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    trained = logits(loaded_by_us(tmp_path / "run" / "adapter"))
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), trained) < 2e-5


def test_a_base_in_bfloat16_is_merged_into_bfloat16(loftq, tokenizer, lora, tmp_path):
    base = tmp_path / "half"
    tiny_model("llama", **WIDE).bfloat16().save_pretrained(base)
    tokenizer.save_pretrained(base)
    assert lora("train", loftq(base=base), "--json").code == 0
    merged = lora("merge", tmp_path / "run" / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


def test_the_plan_counts_the_packed_layers(loftq, model_folder):
    plain = MemoryPlanner(make_plan(load_recipe(loftq(lora={"r": 4})))).memory()
    plans = {bits: MemoryPlanner(make_plan(load_recipe(loftq(bits)))).memory() for bits in KINDS}
    weights = [plans[bits].weights for bits in KINDS]
    assert weights == sorted(weights)
    assert weights[-1] < 0.6 * plain.weights
    assert all(plan.loading >= plain.weights for plan in plans.values()), "it is read whole"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.quantization": "nf4"}, "nf4 cannot be combined with init_lora_weights: loftq, which quantizes"),
        ({"lora.init_lora_weights": True}, "lora.loftq_config belongs to init_lora_weights: loftq"),
        ({"lora.target_parameters": ["experts.down_proj"]}, "loftq cannot be combined with target_parameters"),
        ({"lora.loftq_config": {"loftq_bits": 5}}, "lora.loftq_config.loftq_bits must be 2, 3, 4 or 8, not 5"),
        ({"lora.loftq_config": {"loftq_iter": 0}}, "lora.loftq_config.loftq_iter must be 1 or more"),
    ],
    ids=str,
)
def test_what_is_refused(changes, message, loftq, lora):
    refused = lora("check", loftq(2, **changes))
    assert refused.code == 2
    assert message in refused.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.init_lora_weights": "loftq"}, "is stored quantized, and init_lora_weights: loftq quantizes the base"),
        ({"model.quantization": "nf4"}, "has no effect on a base that is stored quantized"),
        ({"method": "full", "lora": {}}, "is stored quantized, and method: full writes a whole model"),
    ],
    ids=str,
)
def test_a_backbone_is_not_quantized_again(changes, message, loftq, recipe, lora, tmp_path):
    run(loftq(**{"training.max_steps": 1}))
    model = {"path": str(tmp_path / "run" / "backbone"), "dtype": "float32"}
    refused = lora("check", recipe("again.yaml", model=model, **({"output_dir": str(tmp_path / "again")} | changes)))
    assert refused.code == 2
    assert message in refused.err


def test_somebody_elses_quantized_base_is_refused_with_the_reason(loftq, model_folder, tokenizer, lora, tmp_path):
    theirs = tmp_path / "theirs"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama", **WIDE), quantization_config=config)
    model.save_pretrained(theirs)
    tokenizer.save_pretrained(theirs)
    refused = lora("check", loftq(base=theirs))
    assert refused.code == 2
    assert "loftq quantizes the base itself, from its dense weights" in refused.err
    assert "name the base that it was made from" in refused.err


def test_a_base_whose_weights_were_swapped_is_told(loftq, model_folder, lora, tmp_path):
    """The backbone is what a run belongs to; another one of the same shapes is refused when merging."""
    assert lora("train", loftq(), "--json").code == 0
    other = other_weights(model_folder("llama", **WIDE), tmp_path / "other", "causal_lm")
    assert lora("merge", tmp_path / "run" / "adapter", "--base", other).code == 2


def test_modules_in_full_on_a_backbone_stay_dense(loftq, recipe, lora, tmp_path):
    run(loftq(**{"training.max_steps": 1}))
    changes = {"lora": {"modules_to_save": ["layers.1.mlp.up_proj"]}, "output_dir": str(tmp_path / "second")}
    model = {"path": str(tmp_path / "run" / "backbone"), "dtype": "float32"}
    assert lora("train", recipe("second.yaml", model=model, **changes), "--json").code == 0
    merged = lora("merge", tmp_path / "second" / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.json["within_limit"]


def test_an_adapter_finds_its_backbone_where_both_were_moved(loftq, lora, tmp_path):
    run(loftq(**{"training.max_steps": 1}))
    (tmp_path / "run").rename(tmp_path / "moved")
    merged = lora("merge", tmp_path / "moved" / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["base"] == str(tmp_path / "moved" / "backbone")


def test_there_is_no_other_base_to_merge_onto(loftq, lora, tmp_path):
    run(loftq(**{"training.max_steps": 1}))
    refused = lora("merge", tmp_path / "run" / "adapter", "--onto", "dequantized")
    assert refused.code == 2
    assert "is what the run saw of its base, to the bit" in refused.err


def test_a_changed_recipe_is_told_before_a_missing_backbone(loftq, recipe, model_folder, lora):
    model = {"path": str(model_folder("llama", **WIDE)), "dtype": "float32"}
    assert lora("train", recipe(model=model), "--json").code == 0
    refused = lora("train", loftq(**{"dataset.eval_size": 0}))
    assert refused.code == 2
    assert "lora.init_lora_weights was true when this run began, and is" in refused.err


def test_fresh_does_not_set_aside_what_the_run_begins_from(loftq, recipe, lora, tmp_path):
    run(loftq(**{"training.max_steps": 1}))
    again = recipe("again.yaml", model={"path": str(tmp_path / "run" / "backbone"), "dtype": "float32"})
    refused = lora("train", again, "--fresh")
    assert refused.code == 2
    assert "model.path lies in output_dir, which --fresh sets aside" in refused.err
    assert (tmp_path / "run" / "backbone").is_dir()


@pytest.mark.parametrize("beginning", ["pissa", "olora", "lora_ga"])
def test_what_begins_from_weights_needs_dense_ones(beginning, loftq, recipe, lora, tmp_path):
    run(loftq(**{"training.max_steps": 1}))
    model = {"path": str(tmp_path / "run" / "backbone"), "dtype": "float32"}
    changes = {"lora.init_lora_weights": beginning, "output_dir": str(tmp_path / "again")}
    refused = lora("check", recipe("again.yaml", model=model, **changes))
    assert refused.code == 2
    assert f"{beginning} begins from the base's own weights" in refused.err


def test_an_embedding_alone_is_nothing_to_quantize(loftq, lora):
    refused = lora("check", loftq(**{"lora.target_modules": ["embed_tokens"]}))
    assert refused.code == 2
    assert "this recipe adapts none" in refused.err


def test_disk_counts_the_backbone_as_it_is_packed(loftq, lora, tmp_path):
    asked = {bits: lora("check", loftq(bits), "--json").json["disk_bytes"] for bits in KINDS}
    assert sorted(asked.values()) == [asked[bits] for bits in sorted(KINDS)]
    run(loftq(4, **{"training.max_steps": 1}))
    plain = lora("check", loftq(4, lora={"r": 4}, output_dir=str(tmp_path / "x")), "--json").json["disk_bytes"]
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "backbone").glob("*.safetensors"))
    assert 0.9 * written < asked[4] - plain < 1.3 * written


def test_the_backbones_tokenizer_is_loaded_as_the_runs_is_and_before_anything_is_quantized(loftq, lora, monkeypatch):
    asked = []

    def load(section, *, remote_code=False):
        asked.append(remote_code)
        raise UsageError("no tokenizer")

    monkeypatch.setattr("lora_cli.commands.base.load_tokenizer", load)
    monkeypatch.setattr("lora_cli.adapters.backbone.decompose", None)
    assert lora("train", loftq(), "--trust-remote-code").err.startswith("error: no tokenizer")
    assert asked == [True]


def test_a_revision_is_the_full_bases_and_not_the_backbones(loftq):
    plan = make_plan(load_recipe(loftq()))
    folder = replace(plan.model.folder, commit="abc")
    known = replace(plan, model=replace(plan.model, folder=folder))
    assert adapter_config(known, known.model.skeleton, base="x")["revision"] is None
    plain = make_plan(load_recipe(loftq(lora={"r": 4})))
    plain = replace(plain, model=replace(plain.model, folder=folder))
    assert adapter_config(plain, plain.model.skeleton, base="x")["revision"] == "abc"
