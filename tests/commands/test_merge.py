"""`lora merge`: the merged folder is base + adapter, is plain, and is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, BertModel, GPT2Model

from lora_cli.adapters import merging
from lora_cli.adapters.files import read_adapter
from lora_cli.commands import merge as command
from lora_cli.commands import trainable
from lora_cli.commands.provenance import Provenance
from lora_cli.models import read_config
from tests.conftest import AUTO, CHATML, labelled_rows, sentence, tiny_config, tiny_model, write_jsonl
from tests.made import (
    base_model,
    distance,
    loaded_by_us,
    logits,
    other_weights,
    our_adapter,
    peft_adapter,
    task_of,
)

SAME, DIFFERENT = 1e-5, 1e-2
KINDS = ["llama", "gpt2", "bert", "roberta"]


@pytest.fixture
def merged(tmp_path, lora):
    """``merged(adapter, ...)`` merges into ``tmp_path/merged``, which must go well, and returns the report."""

    def run(adapter: Path, *options: object) -> dict:
        result = lora("merge", adapter, "-o", tmp_path / "merged", "--json", *options)
        assert result.code == 0, result.err
        return result.json

    return run


@pytest.fixture
def adapter(tmp_path, model_folder):
    """The folder of a small llama adapter."""
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    return tmp_path / "adapter"


def refused(result, code: int, output: Path) -> str:
    """A refusal has its exit code, leaves nothing, and says why without a traceback."""
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    assert not output.exists()
    assert not list(output.parent.glob(".merged*"))
    return result.err


def loading_info(folder: Path, task: str) -> dict[str, list]:
    _, info = AUTO[task].from_pretrained(folder, output_loading_info=True)
    return {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


NOTHING = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}


def copied(base: Path, folder: Path, edit=None, task: str = "causal_lm") -> Path:
    """Another folder of the same base; ``edit`` changes its table of tensors."""
    shutil.copytree(base, folder)
    if edit is not None:
        tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
        save_file(edit(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# equality


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_base_plus_adapter(kind, tmp_path, model_folder, merged):
    base, task = model_folder(kind, task_of(kind)), task_of(kind)
    lora_keys = {"use_rslora": True, "rank_pattern": {"re:.*1.*": 2}, "alpha_pattern": {"re:.*0.*": 5.0}}
    expected = logits(our_adapter(base, tmp_path / "adapter", task, **lora_keys))
    report = merged(tmp_path / "adapter")
    found = logits(base_model(tmp_path / "merged", task))
    assert distance(found, expected) < SAME
    assert distance(found, logits(base_model(base, task))) > DIFFERENT
    assert loading_info(tmp_path / "merged", task) == NOTHING
    assert report["within_limit"] is True
    assert report["agreement"]["max_abs_difference"] < SAME
    assert report["agreement"]["top1_agreement"] == 1.0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_as_classifier(kind, tmp_path, model_folder, merged):
    """Its base is a language model: the old head goes, the new one comes, and padding has an id."""
    base, task = model_folder(kind), "sequence_classification"
    our_adapter(base, tmp_path / "adapter", task)
    merged(tmp_path / "adapter")
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.pad_token_id == 0  # the tokenizer's
    assert config.architectures == [f"{'Llama' if kind == 'llama' else 'GPT2'}ForSequenceClassification"]
    names = load_file(tmp_path / "merged" / "model.safetensors")
    assert "score.weight" in names
    assert "lm_head.weight" not in names
    assert loading_info(tmp_path / "merged", task) == NOTHING
    ours = loaded_by_us(tmp_path / "adapter")
    ours.config.pad_token_id = 0
    assert distance(logits(base_model(tmp_path / "merged", task)), logits(ours)) < SAME


def classifier_over(base: Path, tmp_path: Path, merged, **lora_keys) -> None:
    """Adapt a base without a classifier's head, merge, and compare."""
    task = "sequence_classification"
    expected = logits(our_adapter(base, tmp_path / "adapter", task, **lora_keys))
    merged(tmp_path / "adapter")
    assert distance(logits(base_model(tmp_path / "merged", task)), expected) < SAME
    assert loading_info(tmp_path / "merged", task) == NOTHING


def test_a_base_saved_from_the_bare_model_lacks_the_prefix(tmp_path, tokenizer, merged):
    torch.manual_seed(0)
    base = tmp_path / "base"
    BertModel(tiny_config("bert")).save_pretrained(base)
    tokenizer.save_pretrained(base)
    assert not any(name.startswith("bert.") for name in load_file(base / "model.safetensors"))
    classifier_over(base, tmp_path, merged)
    assert all(
        name.startswith(("bert.", "classifier.")) for name in load_file(tmp_path / "merged" / "model.safetensors")
    )


def test_an_old_checkpoint_calls_weight_gamma_and_bias_beta(tmp_path, model_folder, merged):
    def age(tensors):
        def old(name: str) -> str:
            if "LayerNorm" not in name:
                return name
            return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

        positions = {"bert.embeddings.position_ids": torch.arange(128)[None]}  # was once saved too
        return {old(name): tensor for name, tensor in tensors.items()} | positions

    base = copied(model_folder("bert", "causal_lm"), tmp_path / "base", age)
    assert any(name.endswith("gamma") for name in load_file(base / "model.safetensors"))
    classifier_over(base, tmp_path, merged, modules_to_save=["pooler"])  # which a language model's file lacks
    names = load_file(tmp_path / "merged" / "model.safetensors")
    assert not any(name.endswith(("gamma", "beta")) or name.startswith("cls.") for name in names)


def test_a_gpt2_file_as_on_the_hub_has_no_prefix_and_holds_its_masks(tmp_path, tokenizer, merged):
    """Bare names, and `attn.bias`: a causal mask that is no parameter."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    config = tiny_config("gpt2", architectures=["GPT2LMHeadModel"])
    GPT2Model(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    tensors = {name: t.clone() for name, t in load_file(base / "model.safetensors").items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128).tril() for layer in (0, 1)}
    save_file(tensors | masks, base / "model.safetensors", metadata={"format": "pt"})
    expected = logits(our_adapter(base, tmp_path / "adapter", "causal_lm"))
    merged(tmp_path / "adapter")
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), expected) < SAME
    assert loading_info(tmp_path / "merged", "causal_lm") == NOTHING


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied_and_untied_ones_untied(tied, tmp_path, model_folder, merged):
    base = model_folder("llama", tie_word_embeddings=tied)
    our_adapter(base, tmp_path / "adapter", "causal_lm")
    merged(tmp_path / "adapter")
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert names == set(load_file(base / "model.safetensors"))
    assert ("lm_head.weight" in names) is not tied
    model = base_model(tmp_path / "merged", "causal_lm")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("module", ["norm", "lm_head", "0.mlp"])
def test_modules_trained_in_full_are_folded(module, tmp_path, model_folder, merged):
    base = model_folder("llama", tie_word_embeddings=False)
    lora_keys = {"modules_to_save": [module], "target_modules": ["q_proj"]}
    expected = logits(our_adapter(base, tmp_path / "adapter", "causal_lm", **lora_keys))
    merged(tmp_path / "adapter")
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), expected) < SAME
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    own = {"norm": "model.norm.", "lm_head": "lm_head.", "0.mlp": "model.layers.0.mlp."}[module]
    assert {name for name in changed if not name.startswith(own)} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)
    }
    assert any(name.startswith(own) for name in changed)


def test_shards_are_kept(tmp_path, model_folder, tokenizer, merged):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base, max_shard_size="30KB")
    tokenizer.save_pretrained(base)
    expected = logits(our_adapter(base, tmp_path / "adapter", "causal_lm"))
    merged(tmp_path / "adapter")
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "merged" / index).read_text()) == {
        "metadata": {"total_size": json.loads((base / index).read_text())["metadata"]["total_size"]},
        "weight_map": json.loads((base / index).read_text())["weight_map"],
    }
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), expected) < SAME
    assert loading_info(tmp_path / "merged", "causal_lm") == NOTHING


# types


@pytest.fixture
def bfloat16_base(tmp_path, tokenizer):
    base = tmp_path / "base"
    tiny_model("llama").bfloat16().save_pretrained(base)
    tokenizer.save_pretrained(base)
    return base


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_every_weight_is_the_float32_sum_rounded_once(dtype, tmp_path, bfloat16_base, merged):
    our_adapter(bfloat16_base, tmp_path / "adapter", "causal_lm")
    report = merged(tmp_path / "adapter", *(["--dtype", dtype] if dtype else []))
    wanted = getattr(torch, dtype or "bfloat16")
    updates = read_adapter(tmp_path / "adapter").updates
    base = load_file(bfloat16_base / "model.safetensors")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in base.items():
        expected = weight.float()
        if update := updates.get(name.removesuffix(".weight")):
            expected = expected + update.scaling * (update.lora_B @ update.lora_A)
        assert torch.equal(found[name], expected.to(wanted)), name
    assert report["dtype"] == (dtype or "bfloat16")
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == wanted


def test_an_unknown_dtype_is_refused(tmp_path, adapter, lora):
    result = lora("merge", adapter, "-o", tmp_path / "merged", "--dtype", "int8")
    assert "use float32, bfloat16 or float16" in refused(result, 2, tmp_path / "merged")


# what else the folder holds


def test_config_tokenizer_and_template_come_along(tmp_path, model_folder, adapter, merged):
    base = model_folder("llama")
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    merged(adapter)
    out = tmp_path / "merged"
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "manifest.json", "merge_report.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_the_adapters_tokenizer_goes_before_the_bases(tmp_path, adapter, model_folder, merged):
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)
    merged(adapter)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages[0]['content'] }}"


def test_a_classifiers_labels_come_along(tmp_path, model_folder, merged):
    our_adapter(model_folder("bert", "sequence_classification"), tmp_path / "adapter", "sequence_classification")
    provenance = json.loads((tmp_path / "adapter" / "provenance.json").read_text())
    Provenance(provenance["base_fingerprint"], ["bad", "good"]).write(tmp_path / "adapter")
    merged(tmp_path / "adapter")
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.id2label == {0: "bad", 1: "good"}
    assert config.architectures == ["BertForSequenceClassification"]


def test_files_can_be_read_by_others(tmp_path, adapter, merged):
    merged(adapter)
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()} == {0o666 & ~mask}


# the report


def test_the_report_says_what_was_compared(tmp_path, model_folder, adapter, merged):
    report = merged(adapter)
    assert report == json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["adapter"] == str(adapter)
    assert report["base"] == str(model_folder("llama"))
    assert report["output"] == str(tmp_path / "merged")
    assert report["dtype"] == "float32"
    assert report["bytes"] == (tmp_path / "merged" / "model.safetensors").stat().st_size
    assert report["rows"] == "built-in sentences"
    assert report["agreement"]["positions"] > 20
    assert report["agreement"]["mean_kl"] <= report["limit_mean_kl"] <= 1e-6
    assert report["adapter_mean_kl"] > 1e-3


def test_without_verification_nothing_is_compared(tmp_path, adapter, merged, monkeypatch):
    monkeypatch.setattr(command, "compare_merged", lambda *_, **__: pytest.fail("compared"))
    report = merged(adapter, "--no-verify")
    assert (report["agreement"], report["within_limit"]) == (None, None)


def test_rows_of_ones_own(tmp_path, adapter, merged):
    rows = write_jsonl(tmp_path / "mine.jsonl", [{"text": sentence(i, 6)} for i in range(3)])
    report = merged(adapter, "--rows", rows)
    assert report["rows"] == str(rows)
    assert 15 < report["agreement"]["positions"] < 100


def test_a_run_is_compared_on_its_own_held_out_rows(tmp_path, recipe, lora, merged):
    assert lora("train", recipe(**{"dataset.eval_size": 6, "training.max_steps": 2})).code == 0
    assert merged(tmp_path / "run" / "adapter")["rows"] == "held-out rows"


def test_rows_are_found_again_where_the_run_could_not_be_trained(tmp_path, recipe, lora, merged, monkeypatch):
    """Another machine, without a compiler, a GPU or bitsandbytes' device: its rows are still the run's."""
    assert lora("train", recipe(**{"dataset.eval_size": 6, "training.max_steps": 2})).code == 0
    resolved = tmp_path / "run" / "resolved.yaml"
    text = resolved.read_text().replace("torch_compile: false", "torch_compile: true")
    text = text.replace("gradient_checkpointing: false", "gradient_checkpointing: offload")
    resolved.write_text(text.replace("use_liger_kernel: false", "use_liger_kernel: true"))
    monkeypatch.setattr(trainable, "why_not_compiled", lambda device: pytest.fail("nothing is compiled to read rows"))
    assert merged(tmp_path / "run" / "adapter")["rows"] == "held-out rows"


def test_a_trained_classifier_merges_and_its_labels_read_well(tmp_path, model_folder, recipe, lora, merged):
    rows = write_jsonl(tmp_path / "labelled.jsonl", [row | {"label": "ab"[row["label"]]} for row in labelled_rows(16)])
    path = recipe(
        task="sequence_classification",
        model={"path": str(model_folder("roberta", "causal_lm")), "dtype": "float32"},
        dataset={"path": str(rows), "max_length": 32, "eval_size": 4},
        **{"training.max_steps": 3},
    )
    trained = lora("train", path)
    assert trained.code == 0, trained.err
    report = merged(tmp_path / "run" / "adapter")
    assert report["rows"] == "held-out rows"
    assert report["agreement"]["positions"] == 4
    assert AutoConfig.from_pretrained(tmp_path / "merged").id2label == {0: "a", 1: "b"}
    assert loading_info(tmp_path / "merged", "sequence_classification") == NOTHING


def test_the_screen_shows_the_figures(tmp_path, adapter, lora):
    result = lora("merge", adapter, "-o", tmp_path / "merged")
    assert result.code == 0, result.err
    for word in ("merged", "wrote", "compared", "mean KL", "limit", "same top 1", "100.00 %"):
        assert word in result.out


def test_the_default_output_stands_beside_the_adapter(tmp_path, adapter, lora, monkeypatch):
    assert lora("merge", adapter, "--no-verify").code == 0
    assert (tmp_path / "adapter-merged" / "model.safetensors").is_file()
    shutil.rmtree(tmp_path / "adapter-merged")
    monkeypatch.chdir(tmp_path)
    assert lora("merge", "adapter/", "--no-verify").code == 0
    assert (tmp_path / "adapter-merged" / "model.safetensors").is_file()


# refusals


def test_an_output_that_exists_is_refused(tmp_path, adapter, lora):
    (tmp_path / "merged").mkdir()
    result = lora("merge", adapter, "-o", tmp_path / "merged")
    assert result.code == 2
    assert f"{tmp_path / 'merged'} exists already" in result.err
    assert list((tmp_path / "merged").iterdir()) == []


def test_a_base_of_another_architecture_is_refused_with_the_names(tmp_path, model_folder, adapter, lora):
    result = lora("merge", adapter, "-o", tmp_path / "merged", "--base", model_folder("gpt2"))
    told = refused(result, 2, tmp_path / "merged")
    assert "model.layers.0.self_attn.q_proj: the base has no such layer" in told
    assert "... and 4 more" in told
    assert "name the right base with --base" in told


def test_a_base_of_other_shapes_is_refused_with_both(tmp_path, model_folder, adapter, lora):
    wider = model_folder("llama", intermediate_size=64)
    told = refused(lora("merge", adapter, "-o", tmp_path / "merged", "--base", wider), 2, tmp_path / "merged")
    assert "model.layers.0.mlp.down_proj: the adapter is for (32, 48), the base has (32, 64)" in told
    assert "model.layers.1.mlp.up_proj: the adapter is for (48, 32), the base has (64, 32)" in told
    assert "q_proj" not in told


def test_a_base_of_other_weights_is_refused(tmp_path, model_folder, adapter, lora):
    other = other_weights(model_folder("llama"), tmp_path / "other", "causal_lm")
    told = refused(lora("merge", adapter, "-o", tmp_path / "merged", "--base", other), 2, tmp_path / "merged")
    assert f"{other} is not the base that {adapter} was trained on" in told
    assert "it holds other weights" in told


def test_the_same_base_elsewhere_is_taken(tmp_path, model_folder, adapter, merged):
    merged(adapter, "--base", copied(model_folder("llama"), tmp_path / "moved"))


def test_a_base_that_is_gone_is_refused(tmp_path, model_folder, lora):
    base = copied(model_folder("llama"), tmp_path / "base")
    our_adapter(base, tmp_path / "adapter", "causal_lm")
    shutil.rmtree(base)
    told = refused(lora("merge", tmp_path / "adapter", "-o", tmp_path / "merged"), 2, tmp_path / "merged")
    assert f"the adapter's base: there is no folder {base}" in told
    assert "name its folder with --base" in told


def test_a_folder_that_is_no_adapter_is_refused(tmp_path, model_folder, lora):
    told = refused(lora("merge", model_folder("llama"), "-o", tmp_path / "merged"), 2, tmp_path / "merged")
    assert "holds no adapter_config.json" in told


def test_a_cut_base_is_refused_as_damaged(tmp_path, model_folder, lora):
    base = copied(model_folder("llama"), tmp_path / "base")
    our_adapter(base, tmp_path / "adapter", "causal_lm")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-4])
    told = refused(lora("merge", tmp_path / "adapter", "-o", tmp_path / "merged"), 5, tmp_path / "merged")
    assert "is cut short" in told


def test_a_quantized_base_is_refused(tmp_path, model_folder, adapter, lora):
    """Its stored numbers are not the weights: a sum with them would be nonsense."""
    base = copied(model_folder("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (base / "config.json").write_text(json.dumps(config))
    told = refused(lora("merge", adapter, "-o", tmp_path / "merged", "--base", base), 2, tmp_path / "merged")
    assert "is stored quantized (fp8)" in told


def test_a_base_with_a_type_that_torch_lacks_is_refused(tmp_path, model_folder, adapter, lora):
    base = copied(model_folder("llama"), tmp_path / "base")
    (adapter / "provenance.json").unlink()
    raw = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(raw.replace(b'"F32"', b'"XYZ"', 1))
    told = refused(lora("merge", adapter, "-o", tmp_path / "merged", "--base", base), 2, tmp_path / "merged")
    assert "is stored as XYZ, which cannot be merged" in told


def test_without_any_tokenizer_the_way_out_is_told(tmp_path, lora):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    our_adapter(base, tmp_path / "adapter", "causal_lm")
    told = refused(lora("merge", tmp_path / "adapter", "-o", tmp_path / "merged"), 2, tmp_path / "merged")
    assert f"neither {tmp_path / 'adapter'} nor {base} holds a tokenizer" in told
    assert "--no-verify" in told
    assert lora("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--no-verify").code == 0


def test_a_tokenizer_with_more_ids_than_the_model_embeds_is_refused(tmp_path, model_folder, tokenizer, lora):
    base = model_folder("llama", vocab_size=64)
    our_adapter(base, tmp_path / "adapter", "causal_lm")
    told = refused(lora("merge", tmp_path / "adapter", "-o", tmp_path / "merged"), 2, tmp_path / "merged")
    assert "the model embeds ids below 64 only" in told


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_long_rows_are_cut_to_the_positions_that_the_model_has(kind, tmp_path, model_folder, merged):
    positions = {"n_positions": 16} if kind == "gpt2" else {"max_position_embeddings": 17, "pad_token_id": 0}
    base = model_folder(kind, task_of(kind), **positions)
    our_adapter(base, tmp_path / "adapter", task_of(kind))
    rows = write_jsonl(tmp_path / "long.jsonl", [{"text": sentence(0, 60)}])
    report = merged(tmp_path / "adapter", "--rows", rows)
    assert report["agreement"]["positions"] == (16 if kind == "gpt2" else 1)


def test_a_file_without_rows_is_refused(tmp_path, adapter, lora):
    result = lora("merge", adapter, "-o", tmp_path / "merged", "--rows", write_jsonl(tmp_path / "rows.jsonl", []))
    assert "rows.jsonl" in refused(result, 6, tmp_path / "merged")


def test_rows_that_cannot_be_read_are_named_and_not_passed_over(tmp_path, adapter, lora):
    (tmp_path / "rows.jsonl").write_text('{"text": "the cat"}\n3\n')
    told = refused(
        lora("merge", adapter, "-o", tmp_path / "merged", "--rows", tmp_path / "rows.jsonl"), 6, tmp_path / "merged"
    )
    assert "1 of 2 rows cannot be used" in told
    assert "rows.jsonl:2: must be a JSON object" in told
    assert "on_bad_row" not in told


def test_rows_that_are_not_there_are_refused(tmp_path, adapter, lora):
    result = lora("merge", adapter, "-o", tmp_path / "merged", "--rows", tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in refused(result, 6, tmp_path / "merged")


# verification


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, -1.0])
def test_a_wrong_scale_fails_the_verification_with_code_5_and_leaves_no_folder(
    stored, factor, tmp_path, adapter, lora, monkeypatch
):
    fold = merging.fold
    monkeypatch.setattr(merging, "fold", lambda w, a, b, scaling, *more: fold(w, a, b, factor * scaling, *more))
    result = lora("merge", adapter, "-o", tmp_path / "merged", "--dtype", stored, "--json")
    told = refused(result, 5, tmp_path / "merged")
    assert "the merged model is not the trained one: mean KL" in told
    assert json.loads(result.out)["error"]["exit_code"] == 5


def test_one_layer_left_out_fails_the_verification(tmp_path, adapter, lora, monkeypatch):
    fold, calls = merging.fold, []

    def forgetful(weight, *rest):
        calls.append(weight)
        return weight if len(calls) == 5 else fold(weight, *rest)

    monkeypatch.setattr(merging, "fold", forgetful)
    refused(lora("merge", adapter, "-o", tmp_path / "merged"), 5, tmp_path / "merged")


# nothing by halves


def test_a_full_disk_leaves_no_folder(tmp_path, adapter, lora, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merging, "write_tensors", full)
    told = refused(lora("merge", adapter, "-o", tmp_path / "merged"), 5, tmp_path / "merged")
    assert "No space left on device" in told


def test_too_little_space_is_told_before_anything_is_written(tmp_path, adapter, lora, monkeypatch):
    monkeypatch.setattr(command, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(command, "merge_files", lambda *_: pytest.fail("wrote"))
    told = refused(lora("merge", adapter, "-o", tmp_path / "merged"), 5, tmp_path / "merged")
    assert "0.0 MB are free" in told


def test_sigkill_in_the_middle_leaves_no_folder_and_merging_again_works(tmp_path, adapter, merged):
    script = """
        import sys, time
        from pathlib import Path
        from lora_cli.commands import merge
        def stop(*_, **__):
            print("ready", flush=True)
            time.sleep(60)
        merge.compare_merged = stop
        merge.merge(Path(sys.argv[1]), Path(sys.argv[2]))
    """
    command_line = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        textwrap.dedent(script),
        str(adapter),
        str(tmp_path / "merged"),
    ]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"  # the weights are written, the folder is not published
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "merged").exists()
    merged(adapter)
    assert not list(tmp_path.glob(".merged*"))


# PEFT's adapters, and real ones


def test_a_peft_adapter_without_provenance_merges(tmp_path, model_folder, merged):
    base = model_folder("llama")
    expected = logits(peft_adapter(base, tmp_path / "adapter", "causal_lm", modules_to_save=["norm"]))
    merged(tmp_path / "adapter")
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), expected) < SAME


def test_a_real_model_merges(tmp_path, shared, merged):
    base = shared / "models" / "stories260K"
    expected = logits(our_adapter(base, tmp_path / "adapter", "causal_lm", r=8))
    report = merged(tmp_path / "adapter")
    found = logits(base_model(tmp_path / "merged", "causal_lm"))
    assert distance(found, expected) < 1e-5 * distance(found, logits(base_model(base, "causal_lm")))
    assert report["agreement"]["mean_kl"] < 1e-10 < 1e-3 < report["adapter_mean_kl"]
    assert read_config(tmp_path / "merged").tie_word_embeddings is True
