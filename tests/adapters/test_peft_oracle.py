"""PEFT is the oracle: what we save it loads, what it saves we load, and both give the same logits.

PEFT warns of unknown configuration keys and of missing or unexpected tensors; in this suite a warning is an
error, so a test that passes has seen none.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cli.adapters.injection import adapters_of
from lora_cli.errors import UsageError
from tests.made import (
    base_model,
    distance,
    loaded_by_peft,
    loaded_by_us,
    logits,
    our_adapter,
    peft_adapter,
    task_of,
)

SAME, DIFFERENT = 1e-5, 1e-2
KINDS = ["llama", "gpt2", "bert", "roberta"]

# a name of each architecture for what the variants below speak of: two kinds of layers, one layer, a module to save
NAMES = {
    "llama": ("q_proj", "down_proj", "model.layers.1.self_attn.q_proj", "norm"),
    "gpt2": ("c_attn", "c_fc", "transformer.h.1.attn.c_attn", "ln_f"),
    "bert": ("query", "intermediate.dense", "bert.encoder.layer.1.attention.self.query", "pooler"),
    "roberta": ("query", "intermediate.dense", "roberta.encoder.layer.1.attention.self.query", "embeddings.LayerNorm"),
}


def ours(kind: str, variant: str) -> dict:
    first, second, one, save = NAMES[kind]
    return {
        "plain": {},
        "some": {"target_modules": [first, second]},
        "one": {"target_modules": [one]},
        "dotted": {"target_modules": ["output.dense" if kind in ("bert", "roberta") else first]},
        "layer": {"layers_to_transform": [1]},
        "exclude": {"exclude_modules": [first]},
        "rslora": {"use_rslora": True, "lora_alpha": 5.0},
        "rank_pattern": {"rank_pattern": {first: 2, one: 8}},
        "alpha_pattern": {"alpha_pattern": {one: 40.0, second: 3.0}},
        "patterns": {
            "use_rslora": True,
            "lora_alpha": 3.5,
            "rank_pattern": {one: 8, first: 2},
            "alpha_pattern": {first: 7.0},
            "lora_dropout": 0.1,
        },
        "modules_to_save": {"modules_to_save": [save], "target_modules": [first]},
        "dora": {"use_dora": True},
        "dora rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {first: 2}},
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "pissa": {"init_lora_weights": "pissa"},
        "pissa_niter": {"init_lora_weights": "pissa_niter_4", "rank_pattern": {first: 2}},
        "olora": {"init_lora_weights": "olora", "use_rslora": True},
        "dora pissa": {"init_lora_weights": "pissa", "use_dora": True},
    }[variant]


VARIANTS = [
    "plain", "some", "one", "dotted", "layer", "exclude", "rslora", "rank_pattern", "alpha_pattern", "patterns",
    "modules_to_save", "dora", "dora rslora", "orthogonal", "pissa", "pissa_niter", "olora", "dora pissa",
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_save_and_gives_the_same_logits(kind, variant, tmp_path, model_folder):
    """And module by module the same rank and scale, should logits ever agree by chance."""
    base, task = model_folder(kind, task_of(kind)), task_of(kind)
    model = our_adapter(base, tmp_path / "adapter", task, **ours(kind, variant))
    loaded = loaded_by_peft(base, tmp_path / "adapter", task)
    assert distance(logits(loaded), logits(model)) < SAME
    assert distance(logits(loaded), logits(base_model(base, task))) > DIFFERENT
    found = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in loaded.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    assert found == {
        name: (layer.file_rank, pytest.approx(layer.scaling)) for name, layer in adapters_of(model).items()
    }


def theirs(kind: str, variant: str) -> dict:
    first, second, one, save = NAMES[kind]
    settings = {
        "plain": {},
        "some": {"target_modules": [first, second]},
        "expression": {"target_modules": rf".*\.{first}"},
        "rslora": {"use_rslora": True, "lora_alpha": 5},
        "rank_pattern": {"rank_pattern": {first: 2, one: 8}},
        "alpha_pattern": {"alpha_pattern": {one: 40, rf".*\.{second}": 3}},
        "patterns": {"use_rslora": True, "rank_pattern": {f"^{one}": 8}, "alpha_pattern": {"1.*": 7}},
        "modules_to_save": {"modules_to_save": [save], "target_modules": [first]},
        "gaussian": {"init_lora_weights": "gaussian"},
        "dora": {"use_dora": True},
        "dora rslora": {"use_dora": True, "use_rslora": True},
        "exclude": {"exclude_modules": [first]},
    }[variant]
    return settings | ({"fan_in_fan_out": True} if kind == "gpt2" else {})


THEIR_VARIANTS = [
    "plain", "some", "expression", "rslora", "rank_pattern", "alpha_pattern", "patterns", "modules_to_save",
    "gaussian", "exclude", "dora", "dora rslora",
]  # fmt: skip


@pytest.mark.parametrize("variant", THEIR_VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_peft_saves_and_give_the_same_logits(kind, variant, tmp_path, model_folder):
    base, task = model_folder(kind, task_of(kind)), task_of(kind)
    expected = logits(peft_adapter(base, tmp_path / "adapter", task, **theirs(kind, variant)))
    found = logits(loaded_by_us(tmp_path / "adapter"))
    assert distance(found, expected) < SAME
    assert distance(found, logits(base_model(base, task))) > DIFFERENT


@pytest.mark.parametrize("kind", KINDS)
def test_lora_merge_of_what_peft_saved_gives_the_same_logits(kind, tmp_path, model_folder, lora):
    base, task = model_folder(kind, task_of(kind)), task_of(kind)
    expected = logits(peft_adapter(base, tmp_path / "adapter", task, **theirs(kind, "patterns")))
    merged = lora("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert distance(logits(base_model(tmp_path / "merged", task)), expected) < SAME
    assert distance(expected, logits(base_model(base, task))) > DIFFERENT


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_as_classifier_goes_both_ways(kind, tmp_path, model_folder):
    base, task = model_folder(kind, pad_token_id=0), "sequence_classification"
    expected = logits(our_adapter(base, tmp_path / "ours", task))
    assert distance(logits(loaded_by_peft(base, tmp_path / "ours", task)), expected) < SAME
    fan = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    expected = logits(peft_adapter(base, tmp_path / "theirs", task, **fan))
    assert distance(logits(loaded_by_us(tmp_path / "theirs")), expected) < SAME


def test_peft_does_warn_of_unknown_keys_and_missing_tensors(tmp_path, model_folder):
    """The control of every test above: silence means something."""
    base, folder = model_folder("llama"), tmp_path / "adapter"
    our_adapter(base, folder, "causal_lm")

    def warned() -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded_by_peft(base, folder, "causal_lm")
        return " ".join(str(warning.message) for warning in caught)

    assert "our_own_key" not in warned()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"our_own_key": 1}))
    assert "our_own_key" in warned()
    assert "missing adapter keys" not in warned()
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors.pop(min(tensors))
    save_file(tensors, path)
    assert "missing adapter keys" in warned()


def test_a_trained_adapter_gives_the_same_logits_in_peft(tmp_path, recipe, lora, model_folder):
    """The whole way: `lora train`, then PEFT."""
    result = lora("train", recipe(**{"lora.use_rslora": True, "lora.rank_pattern": {"v_proj": 2}}), "--json")
    assert result.code == 0, result.err
    base, folder = model_folder("llama"), tmp_path / "run" / "adapter"
    found = logits(loaded_by_peft(base, folder, "causal_lm"))
    assert distance(found, logits(loaded_by_us(folder))) < SAME
    assert distance(found, logits(base_model(base, "causal_lm"))) > DIFFERENT


def test_an_adapter_over_a_bfloat16_base_is_float32_and_peft_reads_it(tmp_path, model_folder):
    base = tmp_path / "base"
    base_model(model_folder("llama"), "causal_lm", torch.bfloat16).save_pretrained(base)
    expected = logits(our_adapter(base, tmp_path / "adapter", "causal_lm"))
    assert distance(logits(loaded_by_peft(base, tmp_path / "adapter", "causal_lm").float()), expected) < SAME


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning:peft")
@pytest.mark.parametrize("modules", [["model.embed_tokens"], ["lm_head"], ["model.embed_tokens", "lm_head"]])
def test_peft_s_copy_of_a_tied_module_is_refused(tmp_path, model_folder, modules):
    """PEFT trains a copy and leaves its partner as it was, or two; put back into a tied base, they would be one."""
    base = model_folder("llama", tie_word_embeddings=True)
    peft_adapter(base, tmp_path / "adapter", "causal_lm", target_modules=["q_proj"], modules_to_save=modules)
    with pytest.raises(UsageError, match=r"was trained with .* in full, which shares its weight with"):
        loaded_by_us(tmp_path / "adapter")


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_a_tied_pair_that_was_trained_as_one_goes_both_ways(tmp_path, model_folder, module, lora):
    """PEFT saves it twice with the same values, and so do we; a merged folder holds it once."""
    base = model_folder("llama", tie_word_embeddings=True)
    chosen = {"target_modules": ["q_proj"], "modules_to_save": [module]}
    theirs = peft_adapter(base, tmp_path / "theirs", "causal_lm", **chosen, ensure_weight_tying=True)
    ours = our_adapter(base, tmp_path / "ours", "causal_lm", **chosen)
    assert distance(logits(loaded_by_us(tmp_path / "theirs")), logits(theirs)) < SAME
    assert distance(logits(loaded_by_peft(base, tmp_path / "ours", "causal_lm")), logits(ours)) < SAME
    for name, model in {"theirs": theirs, "ours": ours}.items():
        assert distance(logits(model), logits(base_model(base, "causal_lm"))) > DIFFERENT
        merged = tmp_path / f"merged-{name}"
        result = lora("merge", tmp_path / name, "-o", merged, "--json")
        assert result.code == 0, result.err
        assert "lm_head.weight" not in load_file(merged / "model.safetensors")
        assert distance(logits(base_model(merged, "causal_lm")), logits(model)) < SAME
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["ensure_weight_tying"]) == (["model.embed_tokens"], True)


def test_an_untied_module_saved_by_peft_is_taken(tmp_path, model_folder):
    base = model_folder("llama", tie_word_embeddings=False)
    model = peft_adapter(base, tmp_path / "adapter", "causal_lm", modules_to_save=["lm_head"])
    assert distance(logits(loaded_by_us(tmp_path / "adapter")), logits(model)) < SAME


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS"])
def test_a_task_that_is_not_known_is_refused_by_name(tmp_path, model_folder, task_type):
    peft_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": task_type}))
    with pytest.raises(UsageError, match=task_type):
        loaded_by_us(tmp_path / "adapter")


def test_an_adapter_without_a_task_is_taken_for_a_language_model(tmp_path, model_folder):
    base = model_folder("llama")
    expected = logits(peft_adapter(base, tmp_path / "adapter", "causal_lm", task_type=None))
    assert distance(logits(loaded_by_us(tmp_path / "adapter")), expected) < SAME
