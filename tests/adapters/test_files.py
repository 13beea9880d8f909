"""Adapters on disk: the exact keys, names and shapes of PEFT's format, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_cli.adapters.adapter import Adapter, LowRank, mismatches, targets_of, tensors_of
from lora_cli.adapters.files import load_trained, read_adapter, save_adapter, trained_tensors
from lora_cli.adapters.injection import attach, freeze_base
from lora_cli.adapters.naming import file_name_of, trained_name_of
from lora_cli.adapters.targets import Target
from lora_cli.errors import StorageError, UsageError
from lora_cli.storage import is_intact, new_folder
from tests.conftest import tiny_model
from tests.made import loaded_by_us, our_adapter, task_of

ALWAYS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout",
    "target_modules", "bias", "inference_mode",
}  # fmt: skip
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture
def saved(tmp_path, model_folder):
    """``saved(kind, **lora)``: the folder of one of our adapters."""

    def save(kind: str = "llama", **lora) -> Path:
        folder = tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}"
        our_adapter(model_folder(kind, task_of(kind)), folder, task_of(kind), **lora)
        return folder

    return save


# adapter_config.json


def test_a_plain_adapter_has_exactly_these_keys_and_values(saved, model_folder):
    folder = saved()
    assert config_of(folder) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_folder("llama")),
        "revision": None,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "bias": "none",
        "inference_mode": True,
    }
    text = (folder / "adapter_config.json").read_text()
    assert text.startswith('{\n  "base_model_name_or_path": ')  # indent 2
    assert list(config_of(folder)) == sorted(config_of(folder))


@pytest.mark.parametrize(
    ("kind", "lora", "more"),
    [
        ("llama", {"use_rslora": True}, {"use_rslora": True}),
        ("llama", {"rank_pattern": {"0.self_attn.q_proj": 2}}, {"rank_pattern": {Q: 2}}),
        ("llama", {"rank_pattern": {"q_proj": 4}}, {}),  # says nothing new
        ("llama", {"alpha_pattern": {"re:.*0.*q_proj": 5.0}}, {"alpha_pattern": {Q: 5}}),
        ("llama", {"alpha_pattern": {"re:.*0.*q_proj": 0.5}}, {"alpha_pattern": {Q: 0.5}}),
        ("llama", {"modules_to_save": ["norm"]}, {"modules_to_save": ["model.norm"]}),
        ("gpt2", {}, {"fan_in_fan_out": True}),
        ("bert", {}, {"modules_to_save": ["classifier"]}),
        ("bert", {"modules_to_save": ["classifier", "pooler"]}, {"modules_to_save": ["classifier", "bert.pooler"]}),
        ("roberta", {"modules_to_save": ["classifier.dense"]}, {"modules_to_save": ["classifier"]}),
    ],
)
def test_other_keys_stand_only_where_they_say_something(saved, kind, lora, more):
    config = config_of(saved(kind, **lora))
    assert {key: value for key, value in config.items() if key not in ALWAYS} == more
    assert config.keys() >= ALWAYS


@pytest.mark.parametrize(
    ("kind", "lora", "expected"),
    [
        ("llama", {"target_modules": ["v_proj", "q_proj"]}, ["q_proj", "v_proj"]),
        ("llama", {"target_modules": "*.self_attn.*"}, ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}, [Q, V]),
        ("gpt2", {}, ["c_attn", "c_fc", "c_proj"]),
        ("gpt2", {"target_modules": "*.mlp.c_proj"}, ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]),
        ("bert", {}, ["dense", "key", "query", "value"]),
        ("roberta", {}, ["dense", "key", "query", "value"]),  # not the head's own dense: it is saved in full
    ],
)
def test_target_modules_is_the_plainest_list_that_means_what_was_adapted(saved, kind, lora, expected):
    assert config_of(saved(kind, **lora))["target_modules"] == expected


# adapter_model.safetensors


def test_names_and_shapes_are_peft_s(saved):
    folder = saved(target_modules=["q_proj", "down_proj"], layers_to_transform=[1], rank_pattern={"down_proj": 2})
    found = {name: (t.dtype, tuple(t.shape)) for name, t in load_file(folder / "adapter_model.safetensors").items()}
    prefix = "base_model.model.model.layers.1."
    assert found == {
        f"{prefix}self_attn.q_proj.lora_A.weight": (torch.float32, (4, 32)),
        f"{prefix}self_attn.q_proj.lora_B.weight": (torch.float32, (32, 4)),
        f"{prefix}mlp.down_proj.lora_A.weight": (torch.float32, (2, 48)),
        f"{prefix}mlp.down_proj.lora_B.weight": (torch.float32, (32, 2)),
    }
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_conv1d_s_tensors_are_not_transposed(saved):
    tensors = load_file(saved("gpt2", target_modules=["c_fc"]) / "adapter_model.safetensors")
    prefix = "base_model.model.transformer.h.0.mlp.c_fc."
    assert tensors[f"{prefix}lora_A.weight"].shape == (4, 32)
    assert tensors[f"{prefix}lora_B.weight"].shape == (128, 4)


def test_a_head_saved_in_full_stands_under_its_own_name(saved):
    tensors = load_file(saved("roberta", target_modules=["query"]) / "adapter_model.safetensors")
    heads = {name.removeprefix("base_model.model.") for name in tensors if "lora_" not in name}
    assert heads == {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        (f"{Q}.lora_A", f"base_model.model.{Q}.lora_A.weight"),
        (f"{Q}.lora_B", f"base_model.model.{Q}.lora_B.weight"),
        ("score.weight", "base_model.model.score.weight"),
        ("classifier.bias", "base_model.model.classifier.bias"),
        ("model.base_model.model.weight", "base_model.model.model.base_model.model.weight"),
    ],
)
def test_names_go_to_the_file_and_back(name, file_name):
    assert file_name_of(name) == file_name
    assert trained_name_of(file_name) == name


# there and back


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_what_is_saved_is_read_back_bit_for_bit(saved, kind):
    folder = saved(kind, use_rslora=True, alpha_pattern={"re:.*0.*": 3.0}, rank_pattern={"re:.*1.*": 2})
    adapter = read_adapter(folder)
    raw = load_file(folder / "adapter_model.safetensors")
    assert {file_name_of(name): t.numpy().tobytes() for name, t in tensors_of(adapter).items()} == {
        name: t.numpy().tobytes() for name, t in raw.items()
    }
    model = loaded_by_us(folder)
    assert all(torch.equal(t, tensors_of(adapter)[name]) for name, t in trained_tensors(model).items())


def test_targets_of_a_read_adapter_know_rank_and_scale(saved):
    folder = saved(target_modules=["q_proj"], lora_alpha=6.0, rank_pattern={"0.self_attn.q_proj": 2})
    other = "model.layers.1.self_attn.q_proj"
    assert targets_of(read_adapter(folder)) == [Target(Q, 2, 3.0, 32, 32), Target(other, 4, 1.5, 32, 32)]


def trained_model():
    model = tiny_model("llama")
    attach(model, [Target(Q, 2, 1.0, 32, 32)])
    freeze_base(model, [])
    return model


def test_load_trained_wants_exactly_the_models_names():
    model = trained_model()
    tensors = {name: torch.ones_like(t) for name, t in trained_tensors(model).items()}
    load_trained(model, tensors)
    assert all(torch.equal(t, torch.ones_like(t)) for t in trained_tensors(model).values())
    tensors["more"] = tensors.pop(f"{Q}.lora_A")
    with pytest.raises(StorageError, match=rf"{Q}.lora_A is missing, more is unexpected"):
        load_trained(model, tensors)


def test_trained_tensors_are_the_trained_ones_only():
    assert set(trained_tensors(trained_model())) == {f"{Q}.lora_A", f"{Q}.lora_B"}


# what is refused


def test_a_folder_that_is_none_or_holds_no_adapter_is_refused(tmp_path, saved):
    with pytest.raises(UsageError, match="there is no folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no adapter_config.json"):
        read_adapter(tmp_path)
    os.rename(saved(), tmp_path / "adapter")
    with pytest.raises(UsageError) as caught:
        read_adapter(tmp_path)  # a run's folder instead of its adapter
    assert caught.value.help == f"did you mean {tmp_path / 'adapter'}?"


def test_a_pickled_adapter_is_refused_with_the_reason(saved):
    folder = saved()
    os.rename(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(UsageError, match=r"holds a pickled adapter \(adapter_model.bin\)") as caught:
        read_adapter(folder)
    assert "a pickle can run code" in caught.value.help
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UsageError, match=r"holds no adapter_model.safetensors"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("kasa_config", {"beta": 1}),
        ("task_type", "TOKEN_CLS"),
    ],
)
def test_a_variant_that_means_something_else_is_refused_by_name(saved, key, value):
    folder = saved()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(config_of(folder) | {key: value}))
    with pytest.raises(UsageError) as caught:
        read_adapter(folder)
    assert caught.value.message == f"{path} uses what is not supported yet: {key}: {value}"


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": False, "lora_bias": False, "bias": "none", "init_lora_weights": True, "target_parameters": None},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": False, "loftq_config": {}, "megatron_core": "megatron.core"},
        {"some_key_of_a_later_version": None},
    ],
)
def test_defaults_and_what_changes_no_meaning_are_taken(saved, values):
    folder = saved()
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | values))
    assert len(read_adapter(folder).updates) == 14


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_torn_config_is_a_storage_error(saved, text):
    folder = saved()
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(StorageError, match=r"adapter_config.json"):
        read_adapter(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"peft_type": "IA3"}', '"LORA"'])
def test_a_config_of_something_else_is_refused(saved, text):
    folder = saved()
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UsageError, match="does not describe a LoRA adapter"):
        read_adapter(folder)


@pytest.mark.parametrize("keep", [0, 50, -1])
def test_a_truncated_file_is_a_storage_error(saved, keep):
    path = saved() / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match=r"adapter_model.safetensors is damaged") as caught:
        read_adapter(path.parent)
    assert caught.value.exit_code == 5


def test_a_flipped_bit_loads_but_is_not_intact(tmp_path):
    """safetensors does not notice; the manifest does."""
    tensors = trained_tensors(trained_model())
    with new_folder(tmp_path / "checkpoint") as folder:
        save_adapter(folder, tensors, {"peft_type": "LORA", "lora_alpha": 4})
    path = tmp_path / "checkpoint" / "adapter_model.safetensors"
    assert is_intact(path.parent)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    read_adapter(path.parent)
    assert not is_intact(path.parent)


def rewritten(folder: Path, edit) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)
    return folder


FULL = f"base_model.model.{Q}"


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors.pop(f"{FULL}.lora_A.weight"),
        lambda tensors: tensors.pop(f"{FULL}.lora_B.weight"),
        lambda tensors: tensors.update({f"{FULL}.lora_A.weight": torch.ones(3, 32)}),
        lambda tensors: tensors.update({f"{FULL}.lora_A.weight": torch.ones(4)}),
        lambda tensors: tensors.update({f"{FULL}.lora_B.weight": torch.ones(32, 4, 1, 1)}),
    ],
    ids=["no-a", "no-b", "rank", "vector", "convolution"],
)
def test_an_a_without_its_b_is_a_storage_error(saved, edit):
    with pytest.raises(StorageError, match=f"the tensors of {Q} do not fit together"):
        read_adapter(rewritten(saved(), edit))


@pytest.mark.parametrize(
    "name",
    ["q.lora_magnitude_vector.weight", "q.lora_B.bias", "q.lora_diag"],
)
def test_tensors_of_other_variants_are_refused_by_name(saved, name):
    folder = rewritten(saved(), lambda tensors: tensors.update({f"base_model.model.{name}": torch.ones(3)}))
    with pytest.raises(UsageError, match="only LoRA and DoRA of linear layers, and LoRA of embeddings, are supported"):
        read_adapter(folder)


def test_an_empty_file_holds_no_adapter(saved):
    with pytest.raises(StorageError, match="holds no adapter"):
        read_adapter(rewritten(saved(), dict.clear))


# fitting


def test_mismatches_list_every_difference():
    update = LowRank(torch.ones(2, 8), torch.ones(6, 2), 1.0)
    adapter = Adapter(
        {}, {"a": update, "b": update, "c": update, "d": update}, {"h.weight": torch.ones(3), "g.weight": torch.ones(1)}
    )
    shapes = {"a.weight": (6, 8), "b.weight": (8, 6), "c.weight": (8, 6), "h.weight": (4,)}
    assert mismatches(adapter, shapes, transposed={"b"}) == [
        "c: the adapter is for (6, 8), the base has (8, 6)",
        "d: the base has no such layer",
        "h.weight: the adapter holds (3,), the base has (4,)",
        "g.weight: the base has no such parameter",
    ]


def test_an_adapter_that_fits_has_no_mismatch(saved):
    shapes = {name: tuple(p.shape) for name, p in tiny_model("llama").named_parameters()}
    assert mismatches(read_adapter(saved()), shapes, set()) == []


def test_an_adapter_that_does_not_say_its_base_asks_for_it(saved):
    folder = saved()
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | {"base_model_name_or_path": None}))
    with pytest.raises(UsageError, match="does not say which base it belongs to") as caught:
        loaded_by_us(folder)
    assert caught.value.help == "name it with --base"
