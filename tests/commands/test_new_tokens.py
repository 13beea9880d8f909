"""`dataset.new_tokens`: from a tokenizer that learns words to a model folder that knows them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_cli.adapters.files import read_adapter
from lora_cli.adapters.tokens import make_room
from tests.conftest import chat_rows, tiny_model, write_jsonl
from tests.made import base_model, distance, loaded_by_us

NEW = ["<tool>", "</tool>"]
KNOWN = 302  # words of the test's tokenizer
IDS = [KNOWN, KNOWN + 1]
SAME = 1e-5


def rows_with_tools(path):
    rows = chat_rows(24)
    for row in rows:
        answer = row["messages"][-1]
        answer["content"] = f"<tool>{answer['content']}</tool>"
    return write_jsonl(path, rows)


@pytest.fixture
def trained(recipe, lora, tmp_path, model_folder):
    """A run on rows with new tokens; returns its base and its adapter's folder."""

    def train(vocabulary=KNOWN, **changes):
        kind = {"vocab_size": vocabulary} | changes
        base = model_folder("llama", **kind)
        path = recipe(
            model={"path": str(base), "dtype": "float32"},
            **{
                "dataset.path": str(rows_with_tools(tmp_path / "tools.jsonl")),
                "dataset.new_tokens": NEW,
                "training.save_steps": 2,
            },
        )
        result = lora("train", path, "--json")
        assert result.code == 0, result.err
        return base, tmp_path / "run" / "adapter"

    return train


def ids_of(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return torch.tensor([tokenizer("the <tool>cat sees</tool> a dog")["input_ids"]])


def answer(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def by_peft(base, folder, size):
    """As the model card says."""
    import peft

    model = base_model(base, "causal_lm")
    model.resize_token_embeddings(size, mean_resizing=False)
    return peft.PeftModel.from_pretrained(model, str(folder)).eval()


@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_peft_and_the_merged_folder_give_the_trained_model_s_logits(tied, room, trained, tmp_path, lora):
    """Where the tables have no room at all for the two new words, and where they have it for one."""
    base, adapter = trained(vocabulary=KNOWN + room, tie_word_embeddings=tied)
    ids = ids_of(adapter)
    assert {*IDS} <= {*ids[0].tolist()}
    expected = answer(loaded_by_us(adapter), ids)
    assert expected.shape[-1] == KNOWN + 2
    assert distance(answer(by_peft(base, adapter, KNOWN + 2), ids), expected) < SAME
    merged = lora("merge", adapter, "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["rows"] in ("training rows", "held-out rows")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert AutoConfig.from_pretrained(tmp_path / "merged").vocab_size == KNOWN + 2
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert torch.equal(ids_of(tmp_path / "merged"), ids)
    assert distance(answer(loaded, ids), expected) < SAME
    without = answer(_grown(base), ids)
    assert distance(without, expected) > 1e-2


def _grown(base):
    model = base_model(base, "causal_lm")
    make_room(model, IDS)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_begin_as_the_mean_and_are_trained_in_every_word_table(tied, trained):
    base, adapter = trained(tie_word_embeddings=tied)
    tables = read_adapter(adapter).tokens
    assert set(tables) == {"model.embed_tokens", *([] if tied else ["lm_head"])}
    stored = load_file(base / "model.safetensors")
    for name, table in tables.items():
        mean = stored[f"{name}.weight"].mean(0)
        assert table.ids == IDS
        assert 1e-4 < distance(table.rows, mean.expand(2, -1)) < 0.2  # 4 steps of 0.01 away


def test_the_mean_is_that_of_the_rows_before():
    model = tiny_model("llama", vocab_size=KNOWN)
    expected = model.model.embed_tokens.weight.detach().double().mean(0)
    other = model.config
    make_room(model, IDS)
    assert (model.config.vocab_size, other.vocab_size) == (KNOWN + 2, KNOWN)
    assert distance(model.model.embed_tokens.weight.detach()[IDS].double(), expected.expand(2, -1)) < 1e-7
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_table_with_room_does_not_grow(trained, tmp_path, lora):
    _, adapter = trained(vocabulary=KNOWN + 64)
    assert "resize_token_embeddings" not in (adapter / "README.md").read_text()
    ids = ids_of(adapter)
    expected = answer(loaded_by_us(adapter), ids)
    assert expected.shape[-1] == KNOWN + 64
    assert lora("merge", adapter, "-o", tmp_path / "merged", "--json").code == 0
    assert distance(answer(base_model(tmp_path / "merged", "causal_lm"), ids), expected) < SAME


def test_the_card_says_what_peft_needs(trained):
    _, adapter = trained()
    assert f"base.resize_token_embeddings({KNOWN + 2})" in (adapter / "README.md").read_text()


def test_resuming_gives_the_same_bytes_and_a_second_run_goes_on(trained, recipe, lora, tmp_path):
    base, adapter = trained(tie_word_embeddings=False)
    first = (adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    shutil.rmtree(adapter)
    assert lora("train", tmp_path / "recipe.yaml", "--json").code == 0
    assert (adapter / "adapter_model.safetensors").read_bytes() == first
    going_on = recipe(
        model={"path": str(base), "dtype": "float32", "tokenizer": str(adapter)},
        lora={"init_from": str(adapter)},
        output_dir=str(tmp_path / "second"),
        **{"dataset.path": str(tmp_path / "tools.jsonl"), "training.learning_rate": 1e-9},
    )
    result = lora("train", going_on, "--json")
    assert result.code == 0, result.err
    ids = ids_of(adapter)
    assert (
        distance(answer(loaded_by_us(tmp_path / "second" / "adapter"), ids), answer(loaded_by_us(adapter), ids)) < SAME
    )


def test_what_cannot_be_a_new_token_is_refused_by_name(recipe, lora):
    result = lora("check", recipe(**{"dataset.new_tokens": ["<tool>", "<|im_end|>"]}))
    assert result.code == 2
    assert "dataset.new_tokens <|im_end|> is a token already, with id 2" in result.err


def test_a_head_that_is_saved_in_full_is_refused(recipe, lora, model_folder):
    base = str(model_folder("llama", tie_word_embeddings=False))
    result = lora(
        "check", recipe(model={"path": base}, **{"dataset.new_tokens": NEW, "lora.modules_to_save": ["lm_head"]})
    )
    assert result.code == 2
    assert "dataset.new_tokens trains rows of lm_head, which is trained in full" in result.err


def test_parameters_are_counted_and_memory_is_planned_with_them(recipe, lora):
    path = recipe()
    plain, more = (
        lora("count-params", path, *extra, "--json").json for extra in ([], ["dataset.new_tokens=[<a>, <b>]"])
    )
    assert more["learnable"] - plain["learnable"] == 2 * 32
    assert lora("check", path, "dataset.new_tokens=[<a>, <b>]", "--json").json["trainable_token_indices"] == {
        "model.embed_tokens": IDS
    }


def test_rows_that_are_not_the_next_ones_fit_no_base(trained, lora):
    """A base with fewer words than the adapter was trained on is another base."""
    _, adapter = trained()
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"trainable_token_indices": [KNOWN + 7, KNOWN + 8]}))
    result = lora("merge", adapter)
    assert result.code == 2
    assert f"the adapter has rows of 32 up to id {KNOWN + 8}, the base has ({KNOWN}, 32)" in result.err


def test_a_head_with_a_bias_is_refused(recipe, lora, tmp_path, tokenizer):
    """PEFT's trained rows leave the bias out, so the two would not give the same."""
    base = tmp_path / "gptj"
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gptj", vocab_size=KNOWN, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=128)
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    result = lora("check", recipe(model={"path": str(base)}, **{"dataset.new_tokens": NEW}))
    assert result.code == 2
    assert "this model's output head has a bias, which PEFT leaves out where it trains rows" in result.err
    assert lora("check", recipe(model={"path": str(base)}, **{"lora.trainable_token_indices": [5]})).code == 0


def test_a_classifier_learns_new_words_too(recipe, lora, tmp_path, model_folder):
    """It has no output head that knows words."""
    task = "sequence_classification"
    base = model_folder("bert", task, vocab_size=KNOWN)
    rows = [{"text": f"the <tool> cat {'sees' if i % 2 else ''}", "label": i % 2} for i in range(16)]
    path = recipe(
        task=task,
        model={"path": str(base), "dtype": "float32"},
        **{"dataset.path": str(write_jsonl(tmp_path / "labelled.jsonl", rows)), "dataset.new_tokens": NEW},
    )
    result = lora("train", path, "--json")
    assert result.code == 0, result.err
    adapter = tmp_path / "run" / "adapter"
    assert list(read_adapter(adapter).tokens) == ["bert.embeddings.word_embeddings"]
    merged = lora("merge", adapter, "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    ids = ids_of(adapter)
    assert distance(answer(base_model(tmp_path / "merged", task), ids), answer(loaded_by_us(adapter), ids)) < SAME
