"""What only the model or the rows can tell, each told before it costs anything or spoils a result."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from lora_cli.adapters.full import train_in_full
from lora_cli.commands import building, trainable
from tests.conftest import chat_rows, labelled_rows, tiny_model, write_jsonl

MAMBA = {"model_type": "mamba", "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}


@pytest.fixture
def tokenizer_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_adapters_that_the_model_never_calls_are_refused_by_name(recipe, lora, tokenizer_folder):
    """Mamba multiplies by dt_proj's weight itself: an adapter there would be saved and mean nothing."""
    path = recipe(model={"config": MAMBA, "tokenizer": tokenizer_folder}, **{"lora.r": 2})
    refused = lora("train", path)
    assert refused.code == 2
    assert "2 adapters get no gradient" in refused.err
    assert "set lora.exclude_modules: [dt_proj]" in refused.err
    assert lora("train", path, "lora.exclude_modules=[dt_proj]", "--fresh").code == 0


def test_a_random_base_without_a_checkpoint_is_drawn_anew(recipe, lora, tokenizer_folder, tmp_path):
    """A kill between the base and the first checkpoint must not leave its base to another seed."""
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    path = recipe(model={"config": config, "tokenizer": tokenizer_folder, "dtype": "float32"})
    weights = tmp_path / "run" / "base" / "model.safetensors"
    assert lora("train", path, "training.max_steps=1").code == 0
    first = weights.read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert lora("train", path, "training.max_steps=1", "training.seed=7").code == 0
    assert weights.read_bytes() != first


def test_a_bad_first_row_does_not_decide_the_format(recipe, lora, tmp_path):
    rows = write_jsonl(tmp_path / "odd.jsonl", [{"mesages": []}, *chat_rows(6)])
    refused = lora("check", recipe(), f"dataset.path={rows}")
    assert refused.code == 6
    assert "odd.jsonl:1: lacks messages (did you mean messages by mesages?)" in refused.err
    assert lora("check", recipe(), f"dataset.path={rows}", "dataset.on_bad_row=skip").code == 0


@pytest.mark.parametrize(
    ("kind", "config", "limit"),
    [
        ("opt", {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}, 48),
        ("gptj", {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "n_positions": 48}, 48),
    ],
)
def test_rows_beyond_the_table_of_positions_are_refused_with_its_length(
    kind, config, limit, recipe, lora, tokenizer_folder
):
    size = {"max_position_embeddings": 48, "num_hidden_layers": 1} if kind == "opt" else {}
    model = {"config": {"model_type": kind, "vocab_size": 320} | config | size, "tokenizer": tokenizer_folder}
    refused = lora("check", recipe(model=model))
    assert refused.code == 2
    assert f"the model has positions for {limit}" in refused.err
    assert lora("check", recipe(model=model), f"dataset.max_length={limit}").code == 0


def test_an_encoder_decoder_is_refused(recipe, lora, tokenizer_folder, tmp_path):
    config = {"model_type": "bart", "vocab_size": 320, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(6))
    path = recipe(model={"config": config, "tokenizer": tokenizer_folder}, **{"dataset.path": str(rows)})
    refused = lora("check", path, "task=sequence_classification")
    assert refused.code == 2
    assert "encoder-decoder (bart)" in refused.err


def test_an_encoder_is_no_language_model_until_it_is_told_to_be_a_decoder(recipe, lora, tokenizer_folder):
    config = {"model_type": "roberta", "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    refused = lora("check", recipe(model={"config": config, "tokenizer": tokenizer_folder}))
    assert refused.code == 2
    assert "is an encoder (roberta), whose tokens see what they should predict" in refused.err
    decoder = {"config": config | {"is_decoder": True}, "tokenizer": tokenizer_folder}
    assert lora("check", recipe(model=decoder)).code == 0


def test_a_model_folder_without_its_tokenizer_is_refused(recipe, lora, model_folder, tmp_path):
    """transformers makes one of a configuration alone: of special tokens, with nothing for text."""
    folder = tmp_path / "gpt2"
    shutil.copytree(model_folder("gpt2"), folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused = lora("check", recipe(**{"model.path": str(folder)}))
    assert refused.code == 2
    assert f"{folder} holds no tokenizer" in refused.err


def test_a_quantized_base_is_refused_before_it_is_loaded(recipe, lora, model_folder, tmp_path):
    folder = tmp_path / "quantized"
    shutil.copytree(model_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    refused = lora("check", recipe(), f"model.path={folder}")
    assert refused.code == 2
    assert "is stored quantized" in refused.err


@pytest.mark.parametrize("change", ["system_prompt=Be kind.", "train_on_prompt=true"])
def test_keys_that_running_text_does_not_read_are_refused(change, recipe, lora, tmp_path):
    rows = write_jsonl(tmp_path / "text.jsonl", [{"text": "the cat sees a bird"}] * 4)
    refused = lora("check", recipe(), f"dataset.path={rows}", f"dataset.{change}")
    assert refused.code == 2
    assert f"dataset.{change.partition('=')[0]} has no effect on rows read as text\n" in refused.err
    assert lora("check", recipe(), f"dataset.path={rows}").code == 0


def test_evaluation_rows_that_are_training_rows_are_noted(recipe, lora, tmp_path):
    path = recipe(rows=6)
    notes = lora("check", path, f"dataset.eval_path={tmp_path / 'rows.jsonl'}", "--json").json["notes"]
    assert "6 evaluation rows are training rows too: their figures say little" in notes
    assert not any("too" in note for note in lora("check", path, "--json").json["notes"])


@pytest.mark.parametrize("change", [{"velora_config": {"rank": 1}}, {"lora_alpha": None}, {"alpha_pattern": {"(": 2}}])
def test_an_adapter_configuration_that_is_not_understood_is_refused(change, recipe, lora, tmp_path):
    """Merged as plain LoRA it would be another model, and the comparison, which reads it alike, would agree."""
    assert lora("train", recipe()).code == 0
    path = tmp_path / "run" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused = lora("merge", path.parent, "-o", tmp_path / "merged")
    assert refused.code == 2
    assert next(iter(change)) in refused.err
    assert not (tmp_path / "merged").exists()


def test_a_list_of_modules_is_trained_in_full_inside_a_bfloat16_model():
    """A ModuleList has no forward of its own: its members must cast for themselves."""
    model = tiny_model("llama").to(torch.bfloat16)
    model.requires_grad_(False)
    train_in_full(model.model.layers)
    ids = torch.arange(6)[None]
    logits = model(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.model.layers.parameters())


class Returns(nn.Module):
    """A module whose output is one of transformers' records."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.linear(x))


def test_an_output_record_stays_a_record():
    module = Returns()
    train_in_full(module)
    out = module(torch.ones(1, 2, dtype=torch.bfloat16))
    assert isinstance(out, BaseModelOutput)
    assert out.last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("command", ["check", "train"])
def test_torch_compile_that_cannot_work_is_told_before_a_weight_is_read(
    command, recipe, lora, model_folder, monkeypatch
):
    monkeypatch.setattr(building, "load_model", lambda *args, **more: pytest.fail("weights were read"))
    monkeypatch.setattr(trainable, "why_not_compiled", lambda device: None)
    gpt2 = {"path": str(model_folder("gpt2")), "dtype": "float32", "quantization": "nf4"}
    refused = lora(command, recipe(model=gpt2, **{"training.torch_compile": True}))
    assert refused.code == 2
    assert "training.torch_compile cannot be used: this model has no fused forms" in refused.err
    assert "whole layers that unpack their weights cannot be compiled" in refused.err
    dense = recipe(**{"training.torch_compile": True})
    monkeypatch.setattr(trainable, "why_not_compiled", lambda device: "g++ is not there")
    refused = lora(command, dense)
    assert refused.code == 2
    assert "training.torch_compile cannot work here: g++ is not there" in refused.err


def test_torch_compile_is_not_refused_by_looks_where_it_works(recipe, lora, model_folder, monkeypatch):
    monkeypatch.setattr(trainable, "why_not_compiled", lambda device: None)
    for kind, packed in [("gpt2", "none"), ("llama", "nf4")]:
        model = {"path": str(model_folder(kind)), "dtype": "float32", "quantization": packed}
        assert lora("check", recipe(model=model, **{"training.torch_compile": True})).code == 0
