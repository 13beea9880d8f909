"""The base model: read whole, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lora_cli.errors import RecipeError, StorageError, UsageError
from lora_cli.models import (
    empty_model,
    fingerprint,
    head_modules,
    load_config,
    load_model,
    load_tokenizer,
    quiet,
    random_model,
    read_config,
    read_tokenizer,
    set_labels,
)
from lora_cli.recipe import ModelSection
from lora_cli.tensorfile import NAMES, Entry, write_tensors
from tests.conftest import tiny_config, tiny_model


@pytest.fixture
def folder(tmp_path, model_folder) -> Path:
    """A copy of the tiny llama that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(model_folder("llama"), copy)
    return copy


def load(folder: Path, task: str = "causal_lm", dtype: torch.dtype = torch.float32):
    return load_model(folder, read_config(folder), task, dtype)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Copied: the library maps the file, and a file that is mapped cannot be written again."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def change(folder: Path, edit) -> None:
    """Rewrite the weights after ``edit`` changed the table of tensors in place."""
    tensors = weights(folder)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# configurations


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"holds no config.json") as caught:
        read_config(tmp_path)
    assert caught.value.help == "is this a model's folder?"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no-such-kind"}', '{"hidden_size": 4}'])
def test_a_config_that_transformers_does_not_understand_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config.json cannot be used: ."):
        read_config(tmp_path)


def inline(**values):
    return load_config(ModelSection(config={"model_type": "llama"} | values, tokenizer="x"))


def inline_mistakes(**values) -> list[tuple[str, str, str | None]]:
    with pytest.raises(RecipeError) as caught:
        inline(**values)
    return [(mistake.name, mistake.message, mistake.help) for mistake in caught.value.mistakes]


def test_an_inline_config_is_transformers_own(tmp_path):
    config, folder = inline(hidden_size=64, num_hidden_layers=3, tie_word_embeddings=True)
    assert folder is None
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 64, 3)
    assert config.tie_word_embeddings is True
    assert config.intermediate_size == 11008  # what is not given keeps its default


def test_a_misspelt_model_type_is_answered_with_the_near_one():
    assert inline_mistakes(model_type="lama") == [
        ("model.config.model_type", "is not a model type of transformers: lama", "did you mean llama?")
    ]
    [(_, message, _)] = inline_mistakes(model_type=["llama"])
    assert message.startswith("is not a model type of transformers")


def test_every_misspelt_key_of_an_inline_config_is_told():
    assert inline_mistakes(hiden_size=4, num_layers_=2, vocab_size=10) == [
        ("model.config.hiden_size", "unknown key for llama", "did you mean hidden_size?"),
        ("model.config.num_layers_", "unknown key for llama", "did you mean num_labels?"),
    ]


def test_a_wrong_value_of_an_inline_config_is_told():
    [(name, message, _)] = inline_mistakes(hidden_size="many")
    assert name == "model.config"
    assert message.startswith("is not a llama configuration: Validation error for field 'hidden_size': TypeError: ")
    assert "expected int, got str (value: 'many')" in message


def test_names_that_transformers_keeps_as_aliases_are_taken():
    config, _ = inline(model_type="gpt2", hidden_size=48, num_hidden_layers=3, num_attention_heads=4)
    assert (config.n_embd, config.n_layer, config.n_head) == (48, 3, 4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_keys_that_every_model_knows_are_taken(kind):
    values = {"num_labels": 3, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "tie_word_embeddings": False}
    config, _ = inline(model_type=kind, **values)
    assert {key: getattr(config, key) for key in values} == values


def test_labels_stand_in_the_configuration_under_their_names():
    config = tiny_config("bert")
    set_labels(config, ["no", "maybe", "yes"])
    assert config.num_labels == 3
    assert config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert config.label2id == {"no": 0, "maybe": 1, "yes": 2}


# models


def test_an_empty_model_has_every_shape_and_no_memory():
    model = empty_model(tiny_config("llama", vocab_size=10**7, hidden_size=4096), "causal_lm")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.get_input_embeddings().weight.shape == (10**7, 4096)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(("kind", "task"), [("t5", "causal_lm"), ("clip", "sequence_classification")])
def test_an_architecture_without_that_task_is_refused(kind, task):

    with pytest.raises(UsageError, match=f"{kind} models have no {task} form in transformers"):
        empty_model(AutoConfig.for_model(kind), task)


def test_a_configuration_that_builds_no_model_is_refused():
    with pytest.raises(UsageError, match=r"no llama model can be built from its configuration: ."):
        empty_model(tiny_config("llama", hidden_size=-32), "causal_lm")


def test_a_loaded_model_is_the_saved_one(model_folder):
    model, missing = load(model_folder("llama"))
    assert missing == []
    ids = torch.arange(10)[None]
    assert torch.equal(model(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_once_to_the_wanted_dtype(model_folder, dtype):
    model, _ = load(model_folder("llama"), dtype=dtype)
    expected = dict(tiny_model("llama").named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name].to(dtype)), name


def test_parameters_that_the_files_lack_are_named(model_folder):
    _, missing = load(model_folder("bert", "causal_lm"), "sequence_classification")
    assert missing == ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"]


def test_a_folder_without_safetensors_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds no model.safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(UsageError, match="holds pickled weights only"):
        load(folder)


def test_a_missing_shard_is_refused(folder):
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    load(folder)
    shards[1].unlink()
    with pytest.raises(UsageError, match=f"lacks weight files named in its index: {shards[1].name}"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_a_truncated_file_is_a_storage_error(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match=r"cannot be loaded|is not a readable safetensors file") as caught:
        load(folder)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(folder, value):
    change(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1).__setitem__(7, value))
    with pytest.raises(StorageError, match=r"model.layers.1.mlp.up_proj.weight in .* holds values that are not finite"):
        load(folder)


def test_a_weight_of_another_shape_is_a_storage_error(folder):
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(StorageError, match="cannot be loaded"):
        load(folder)


@pytest.mark.parametrize("name", ["no_such_attention", "flash_attention_2", "some-org/some-kernel"])
def test_an_attention_that_cannot_be_used_is_the_recipes_mistake(name):
    """Unknown, not installed, or code from the hub: refused on the empty model, before a weight is read."""
    with pytest.raises(RecipeError) as caught:
        empty_model(tiny_config("llama"), "causal_lm", attn_implementation=name)
    [mistake] = caught.value.mistakes
    assert mistake.name == "model.attn_implementation"
    assert mistake.message.startswith(f"{name} cannot be used here: ")


def test_the_attention_that_is_asked_for_is_used(model_folder):
    folder = model_folder("llama")
    for name in ("eager", "sdpa"):
        model, _ = load_model(folder, read_config(folder), "causal_lm", torch.float32, attn_implementation=name)
        assert model.config._attn_implementation == name


CAPPED = {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None}


def test_a_cap_on_attention_scores_is_never_left_out(tmp_path):
    """transformers up to 5.17 would take sdpa here, which knows none."""
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2} | CAPPED
    config = AutoConfig.for_model("gemma2", **settings)
    made = random_model(config, "causal_lm", torch.float32, 1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    made.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, read_config(tmp_path), "causal_lm", torch.float32)
    ids = torch.arange(1, 20)[None]
    capped = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, capped)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    assert (model(ids).logits - capped).abs().max() > 1e-4, "the control: it makes a difference"
    assert empty_model(config, "causal_lm").config._attn_implementation == "eager"
    with pytest.raises(RecipeError, match="sdpa would leave out this model's soft cap"):
        empty_model(config, "causal_lm", attn_implementation="sdpa")


def test_a_random_model_is_a_function_of_its_seed():
    config = tiny_config("llama")
    first, again, other = (random_model(config, "causal_lm", torch.float32, seed) for seed in (1, 1, 2))
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("kind", "task", "expected"),
    [
        ("bert", "sequence_classification", ["classifier"]),
        ("roberta", "sequence_classification", ["classifier"]),
        ("gpt2", "sequence_classification", ["score"]),
        ("llama", "sequence_classification", ["score"]),
        ("llama", "causal_lm", []),
    ],
)
def test_the_head_of_a_classifier_is_found(kind, task, expected):
    assert head_modules(empty_model(tiny_config(kind), task), task) == expected


# tokenizers


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no tokenizer that can be used") as caught:
        read_tokenizer(tmp_path)
    assert caught.value.help == "set model.tokenizer to a folder or hub id"


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "no"}}'])
def test_a_damaged_tokenizer_is_refused(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UsageError, match="holds no tokenizer that can be used"):
        read_tokenizer(folder)


def test_the_tokenizer_may_stand_elsewhere(tmp_path, folder, model_folder):
    section = ModelSection(path=str(tmp_path), tokenizer=str(folder))
    assert (
        load_tokenizer(section)("the cat")["input_ids"] == read_tokenizer(model_folder("gpt2"))("the cat")["input_ids"]
    )


def test_a_tokenizer_of_another_model_is_refused_before_training(recipe, model_folder, lora):
    """Its ids would crash the embedding, or on a GPU read beyond it."""
    small = model_folder("llama", vocab_size=64)
    result = lora("check", recipe(model={"path": str(small), "dtype": "float32"}))
    assert result.code == 2
    assert "and the model embeds ids below 64 only" in result.err
    assert "set model.tokenizer to the model's own tokenizer" in result.err


# fingerprints


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors["model.norm.weight"].view(-1).__setitem__(0, 5.0),
        lambda tensors: tensors["model.norm.weight"].view(-1).__setitem__(-1, 5.0),
        lambda tensors: tensors["model.embed_tokens.weight"].view(-1).__setitem__(-1, 5.0),
        lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1).__setitem__(255, 5.0),
        lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1).__setitem__(-256, 5.0),
        lambda tensors: tensors.update({"model.norm_.weight": tensors.pop("model.norm.weight")}),
        lambda tensors: tensors["model.embed_tokens.weight"].resize_(32, 320),
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].bfloat16()}),
        lambda tensors: tensors.update({"extra": torch.ones(1)}),
        lambda tensors: tensors.pop("model.norm.weight"),
    ],
    ids=["first", "last", "end", "first-1024-bytes", "last-1024-bytes", "name", "shape", "dtype", "more", "less"],
)
def test_a_fingerprint_differs_with_one_weight_name_shape_or_type(folder, edit):
    before = fingerprint(folder)
    change(folder, lambda tensors: None)
    assert fingerprint(folder) == before  # the control: rewriting changes nothing
    change(folder, edit)
    assert fingerprint(folder) != before


def test_a_model_cut_into_other_shards_has_the_same_fingerprint(tmp_path):
    model = tiny_model("llama", num_hidden_layers=3)
    found = {}
    for size in ("1GB", "30KB", "15KB"):
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        found[len(list((tmp_path / size).glob("*.safetensors")))] = fingerprint(tmp_path / size)
    assert len(found) == 3  # three different numbers of files
    assert len(set(found.values())) == 1


def test_the_order_of_tensors_in_a_file_does_not_matter(folder):
    before = fingerprint(folder)
    tensors = weights(folder)
    entries = [Entry(name, NAMES[t.dtype], tuple(t.shape)) for name, t in reversed(tensors.items())]
    write_tensors(folder / "model.safetensors", entries, lambda entry: tensors[entry.name])
    assert fingerprint(folder) == before


def test_a_fingerprint_of_a_cut_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="is cut short"):
        fingerprint(folder)


# the rest


def test_quiet_puts_the_verbosity_back_even_after_an_error():
    from transformers.utils import logging

    before = logging.get_verbosity()
    with quiet():
        assert logging.get_verbosity() == logging.ERROR
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert logging.get_verbosity() == before


def test_a_real_model_predicts_its_own_kind_of_text(shared):
    """The real checkpoint loads and predicts: its loss on its own kind of text is far below chance (log 512 = 6.2)."""
    folder = shared / "models" / "stories260K"
    model, missing = load(folder)
    ids = read_tokenizer(folder)("Once upon a time, there was a little girl named Lily.", return_tensors="pt").input_ids
    assert missing == []
    assert float(model(input_ids=ids, labels=ids).loss.detach()) < 2.0


def test_inline_values_survive_a_round_trip(tmp_path):
    config, _ = inline(hidden_size=64, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 64
    assert read_config(tmp_path).hidden_size == 64
