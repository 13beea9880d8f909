"""`lora.init_from`: a run that goes on from an adapter, ours or PEFT's."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.adapters.files import read_adapter
from tests.made import distance, loaded_by_us, logits, other_weights, our_adapter, peft_adapter, task_of


def trained_from(recipe, adapter, **changes):
    return recipe(
        lora={"init_from": str(adapter)}, **{"training.max_steps": 1, "training.learning_rate": 1e-9} | changes
    )


@pytest.mark.parametrize(
    "variant",
    [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"rank_pattern": {"q_proj": 2}, "use_rslora": True}],
)
def test_it_begins_where_the_adapter_ended(variant, recipe, model_folder, tmp_path, lora):
    expected = our_adapter(model_folder("llama"), tmp_path / "first", "causal_lm", **variant)
    result = lora("train", trained_from(recipe, tmp_path / "first"), "--json")
    assert result.code == 0, result.err
    ours = loaded_by_us(tmp_path / "run" / "adapter")
    assert distance(logits(ours), logits(expected)) < 1e-5
    first, second = (read_adapter(tmp_path / name) for name in ("first", "run/adapter"))
    assert first.updates.keys() == second.updates.keys()
    for name, update in first.updates.items():
        assert second.updates[name].lora_A.shape == update.lora_A.shape
        assert second.updates[name].scaling == pytest.approx(update.scaling)


def test_it_goes_on_from_peft_s_and_learns(recipe, model_folder, tmp_path, lora):
    base = model_folder("llama")
    peft_adapter(base, tmp_path / "first", "causal_lm", target_modules=["q_proj", "up_proj"], use_rslora=True)
    result = lora("train", trained_from(recipe, tmp_path / "first", **{"training.learning_rate": 0.01}), "--json")
    assert result.code == 0, result.err
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "run/adapter"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_classifier_s_head_comes_along(recipe, model_folder, tmp_path, lora):
    base, task = model_folder("roberta", task_of("roberta")), task_of("roberta")
    expected = our_adapter(base, tmp_path / "first", task)
    rows = tmp_path / "labelled.jsonl"
    rows.write_text("".join(json.dumps({"text": f"bird {i}", "label": i % 2}) + "\n" for i in range(8)))
    changes = {"task": task, "dataset.path": str(rows), "model": {"path": str(base), "dtype": "float32"}}
    result = lora("train", trained_from(recipe, tmp_path / "first", **changes), "--json")
    assert result.code == 0, result.err
    assert distance(logits(loaded_by_us(tmp_path / "run" / "adapter")), logits(expected)) < 1e-5


def test_other_weights_another_task_and_another_shape_are_refused(recipe, model_folder, tmp_path, lora):
    base = model_folder("llama")
    our_adapter(base, tmp_path / "first", "causal_lm")
    other = other_weights(base, tmp_path / "other", "causal_lm")
    (other / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    (other / "tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes())
    (other / "chat_template.jinja").write_bytes((base / "chat_template.jinja").read_bytes())
    result = lora("train", trained_from(recipe, tmp_path / "first", model={"path": str(other), "dtype": "float32"}))
    assert result.code == 2
    assert "lora.init_from was trained on other weights than those in model.path" in result.err
    wide = model_folder("llama", intermediate_size=64)
    result = lora("check", trained_from(recipe, tmp_path / "first", model={"path": str(wide)}))
    assert result.code == 2
    assert "lora.init_from does not fit this model: model.layers.0.mlp" in result.err
    rows = tmp_path / "labelled.jsonl"
    rows.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    result = lora(
        "check",
        trained_from(recipe, tmp_path / "first", task="sequence_classification", **{"dataset.path": str(rows)}),
    )
    assert result.code == 2
    assert "lora.init_from is an adapter for causal_lm, and this run's task is sequence_classification" in result.err


def test_an_adapter_that_changed_since_is_refused_on_resume(recipe, model_folder, tmp_path, lora):
    base = model_folder("llama")
    our_adapter(base, tmp_path / "first", "causal_lm")
    path = trained_from(recipe, tmp_path / "first")
    assert lora("train", path, "--json").code == 0
    (tmp_path / "second").mkdir()
    our_adapter(base, tmp_path / "second" / "adapter", "causal_lm", init_lora_weights="gaussian")
    path.write_text(path.read_text().replace(str(tmp_path / "first"), str(tmp_path / "second" / "adapter")))
    result = lora("train", path)
    assert result.code == 2
    assert "lora.init_from holds other weights than when this run began" in result.err
    (tmp_path / "first").rename(tmp_path / "moved")  # where it lies is free
    path.write_text(path.read_text().replace(str(tmp_path / "second" / "adapter"), str(tmp_path / "moved")))
    assert lora("train", path).code == 0


def test_what_is_no_adapter_is_told_at_the_key(recipe, tmp_path, lora):
    result = lora("check", trained_from(recipe, tmp_path / "nowhere"))
    assert result.code == 2
    assert f"lora.init_from cannot be used: there is no folder {tmp_path / 'nowhere'}" in result.err
    assert "recipe.yaml:" in result.err


def test_an_adapter_below_the_output_folder_is_not_set_aside(recipe, model_folder, tmp_path, lora):
    our_adapter(model_folder("llama"), tmp_path / "run" / "adapter", "causal_lm")
    (tmp_path / "run" / "resolved.yaml").write_text("")
    result = lora("train", trained_from(recipe, tmp_path / "run" / "adapter"), "--fresh")
    assert result.code == 2
    assert "lora.init_from lies in output_dir, which --fresh sets aside" in result.err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning:peft")
def test_an_adapter_on_the_output_head_is_refused(recipe, model_folder, tmp_path, lora):
    base = model_folder("llama", tie_word_embeddings=False)
    peft_adapter(base, tmp_path / "first", "causal_lm", target_modules=["q_proj", "lm_head"])
    path = tmp_path / "first" / "adapter_model.safetensors"
    save_file({name: t.clone() for name, t in load_file(path).items() if "base_layer" not in name}, path)
    result = lora("check", trained_from(recipe, tmp_path / "first", model={"path": str(base), "dtype": "float32"}))
    assert result.code == 2
    assert "lora.init_from adapts the output head (lm_head)" in result.err


def test_new_words_come_with_their_tokenizer(recipe, model_folder, tmp_path, lora, tokenizer):
    base = str(model_folder("llama", vocab_size=len(tokenizer)))
    model = {"path": base, "dtype": "float32"}
    first = recipe("first.yaml", model=model, **{"dataset.new_tokens": ["<x>", "<y>"], "training.max_steps": 1})
    assert lora("train", first, "--json").code == 0
    adapter = (tmp_path / "run" / "adapter").rename(tmp_path / "first")
    without = trained_from(recipe, adapter, output_dir=str(tmp_path / "second"), model=model)
    result = lora("check", without)
    assert result.code == 2
    assert f"set model.tokenizer: {adapter}" in result.err
    model["tokenizer"] = str(adapter)
    result = lora("train", trained_from(recipe, adapter, output_dir=str(tmp_path / "second"), model=model), "--json")
    assert result.code == 0, result.err
    assert "resize_token_embeddings" in (tmp_path / "second" / "adapter" / "README.md").read_text()
    for command in (["shrink", "--rank", "2"], ["export", "--for", "peft"]):
        refused = lora(command[0], adapter, *command[1:], "-o", tmp_path / "new")
        assert refused.code == 2
        assert "rows of word tables" in refused.err
    refused = lora("combine", adapter, adapter, "--weights", "0.5,0.5", "-o", tmp_path / "new")
    assert refused.code == 2
    assert "rows of word tables" in refused.err
