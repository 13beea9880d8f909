"""Trained rows of the word tables: against plain autograd in float64, and against PEFT in both directions.

Shape suffixes: V vocabulary, D hidden size.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lora_cli.adapters.injection import freeze_base
from lora_cli.adapters.tokens import ROWS, attach_rows, find_rows, rows_of
from lora_cli.errors import StorageError, UsageError
from lora_cli.fusion.proof import build_network
from tests.conftest import tiny_model
from tests.fusion.test_networks import CAUSAL, adapted, loss_and_gradients, reference, worst
from tests.fusion.test_networks import rows_of as examples
from tests.made import (
    IDS,
    base_model,
    distance,
    loaded_by_peft,
    loaded_by_us,
    logits,
    our_adapter,
    peft_adapter,
    perturb,
    task_of,
)

CHOSEN = [5, 300, 17, 8]  # all of them are among IDS
SAME, DIFFERENT = 1e-5, 1e-2
KINDS = ["llama", "gpt2", "bert"]


def with_rows(kind="llama", ids=CHOSEN, **changes):
    model = tiny_model(kind, **changes)
    freeze_base(model, [])
    attach_rows(model, find_rows(model, ids, []))
    return model


def test_at_first_the_embedding_is_the_base_s_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama").to(dtype)
        expected = model.model.embed_tokens(IDS)
        attach_rows(model, find_rows(model, CHOSEN, []))
        assert torch.equal(model.model.embed_tokens(IDS), expected)
        assert model.model.embed_tokens.trainable_tokens_delta.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_plain_autograd(tied):
    """In float64, the whole table trained by itself: our rows' gradient is that of its rows; nothing else has one."""
    reference = tiny_model("llama", tie_word_embeddings=tied).double()
    head = reference.lm_head.weight
    if not tied:
        head.requires_grad_(False)
    F.cross_entropy(reference(input_ids=IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    expected_VD = reference.model.embed_tokens.weight.grad
    model = with_rows(tie_word_embeddings=tied).double()
    F.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(found) == ["model.embed_tokens.trainable_tokens_delta"]
    assert distance(found.popitem()[1], expected_VD[CHOSEN]) < 1e-12
    assert distance(expected_VD[CHOSEN], expected_VD[[6, 301, 18, 9]]) > 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "cohere", "gpt2"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_fast_way_s_loss_and_gradients_are_the_model_s_own(kind, tied, dtype, limit):
    """Head folded into the loss, rows end to end; against the model's own code in float64, row by row.

    Among the architectures: a cap on the logits, a scale of them, a scale of the embedding.
    """
    model = adapted(kind, "causal_lm", CAUSAL[kind][0] | {"tie_word_embeddings": tied}, dtype)
    attach_rows(model, find_rows(model, [3, 50, 7, 119], []))
    perturb(model)
    rows = examples("causal_lm")
    exact = reference(model, "causal_lm", rows)
    network = build_network(model, "causal_lm")
    assert network.head is not None
    assert (network.head.rows_TD is not None) == tied
    (name,) = [name for name in exact if name.endswith(ROWS)]
    assert float(exact[name].norm()) > 0.01 * max(float(g.norm()) for key, g in exact.items() if key != "loss")
    assert worst(loss_and_gradients(network, "causal_lm", rows), exact) < limit


def test_a_head_that_forgets_the_rows_would_be_seen(monkeypatch):
    """The control: without the rows the formula is not the model's head, and is not used."""
    monkeypatch.setattr("lora_cli.fusion.heads.parts_of", lambda output: (output.base, None, None))
    model = with_rows()
    perturb(model)
    assert build_network(model, "causal_lm").head is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_our_rows_and_gives_the_same_logits(kind, tied, tmp_path, model_folder):
    base, task = folder_of(kind, tied, model_folder), task_of(kind)
    model = our_adapter(base, tmp_path / "adapter", task, trainable_token_indices=CHOSEN)
    assert distance(logits(loaded_by_peft(base, tmp_path / "adapter", task)), logits(model)) < SAME
    assert distance(logits(loaded_by_us(tmp_path / "adapter")), logits(model)) < SAME
    assert without_rows(tmp_path, base) > DIFFERENT
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == CHOSEN


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_we_load_and_merge_peft_s_rows(kind, tied, tmp_path, model_folder, lora):
    base, task = folder_of(kind, tied, model_folder), task_of(kind)
    fan = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    expected = logits(peft_adapter(base, tmp_path / "adapter", task, trainable_token_indices=CHOSEN, **fan))
    assert distance(logits(loaded_by_us(tmp_path / "adapter")), expected) < SAME
    assert without_rows(tmp_path, base) > DIFFERENT
    merged = lora("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert distance(logits(base_model(tmp_path / "merged", task)), expected) < SAME


def folder_of(kind, tied, model_folder):
    """A classifier has no head that could be tied."""
    changes = {} if task_of(kind) == "sequence_classification" else {"tie_word_embeddings": tied}
    return model_folder(kind, task_of(kind), **changes)


def without_rows(tmp_path, base):
    """How far the logits are from those of the same adapter with the base's own rows."""
    model = loaded_by_us(tmp_path / "adapter")
    before = logits(model)
    with torch.no_grad():
        for table in rows_of(model).values():
            table.trainable_tokens_delta.copy_(table.weight[list(table.ids)])
    return distance(logits(model), before)


def test_peft_s_rows_of_an_untied_head_are_taken_too(tmp_path, model_folder, lora):
    base = model_folder("llama", tie_word_embeddings=False)
    named = {"embed_tokens": CHOSEN, "lm_head": [4, 9]}
    expected = logits(peft_adapter(base, tmp_path / "adapter", "causal_lm", trainable_token_indices=named))
    assert distance(logits(loaded_by_us(tmp_path / "adapter")), expected) < SAME
    assert lora("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--json").code == 0
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), expected) < SAME


def test_peft_s_other_rows_in_two_tied_tables_are_refused(tmp_path, model_folder):
    base = model_folder("llama", tie_word_embeddings=True)
    named = {"embed_tokens": CHOSEN, "lm_head": [4, 9]}
    peft_adapter(base, tmp_path / "adapter", "causal_lm", trainable_token_indices=named)
    with pytest.raises(UsageError, match="was trained with lm_head in part, which shares its weight with"):
        loaded_by_us(tmp_path / "adapter")


def test_a_merged_base_that_stores_both_of_a_tied_pair_has_the_rows_in_both(tmp_path, model_folder, lora):
    base = tmp_path / "base"
    shutil.copytree(model_folder("llama", tie_word_embeddings=True), base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    model = our_adapter(base, tmp_path / "adapter", "causal_lm", trainable_token_indices=CHOSEN)
    assert lora("merge", tmp_path / "adapter", "-o", tmp_path / "merged", "--json").code == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"][CHOSEN], rows_of(model)["model.embed_tokens"].trainable_tokens_delta)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ({"lora.trainable_token_indices": [5, 400]}, "trainable_token_indices has no row 400: this model embeds"),
        (
            {"lora.trainable_token_indices": [5], "lora.modules_to_save": ["embed_tokens"]},
            "trains rows of model.embed_tokens, which is trained in full",
        ),
        ({"lora.trainable_token_indices": [5], "method": "full"}, "has no effect with method: full"),
    ],
)
def test_what_cannot_be_is_refused_with_one_line(key, words, recipe, lora, model_folder):
    base = str(model_folder("llama", tie_word_embeddings=False))
    result = lora("check", recipe(model={"path": base}, **key))
    assert result.code == 2
    assert words in result.err


def test_ids_that_are_not_those_of_the_file_s_rows_are_refused(tmp_path, model_folder):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm", trainable_token_indices=CHOSEN)
    path = tmp_path / "adapter" / "adapter_config.json"
    for ids in ([5, 6], [5, 5, 6, 7], None, {"lm_head": CHOSEN}, ["a", "b", "c", "d"]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": ids}))
        with pytest.raises(StorageError, match=r"trainable_token_indices in adapter_config\.json does not agree"):
            loaded_by_us(tmp_path / "adapter")


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_trains_its_rows_and_no_other(tied, recipe, lora, tmp_path, model_folder):
    """The whole way: train, resume to the same bytes, go on from it, merge; and PEFT reads the result."""
    base = model_folder("llama", tie_word_embeddings=tied)
    changes = {"model": {"path": str(base), "dtype": "float32"}, "lora.trainable_token_indices": [1, 2, 300]}
    result = lora("train", recipe(**changes, **{"training.save_steps": 2}), "--json")
    assert result.code == 0, result.err
    adapter = tmp_path / "run" / "adapter"
    rows = load_file(adapter / "adapter_model.safetensors")[f"base_model.model.model.embed_tokens.token_adapter.{ROWS}"]
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert distance(rows[:2], table[[1, 2]]) > 1e-3
    assert distance(logits(loaded_by_peft(base, adapter, "causal_lm")), logits(loaded_by_us(adapter))) < SAME
    assert lora("merge", adapter, "-o", tmp_path / "merged", "--json").code == 0
    written = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    untouched = [i for i in range(len(table)) if i not in (1, 2, 300)]
    assert torch.equal(written[untouched], table[untouched])
    assert torch.equal(written[[1, 2, 300]], rows)
    first = (adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    shutil.rmtree(adapter)
    assert lora("train", tmp_path / "recipe.yaml", "--json").code == 0
    assert (adapter / "adapter_model.safetensors").read_bytes() == first
    going_on = recipe(lora={"init_from": str(adapter)}, model=changes["model"], output_dir=str(tmp_path / "second"))
    assert lora("train", going_on, "training.learning_rate=1e-9", "--json").code == 0
    assert distance(logits(loaded_by_us(tmp_path / "second" / "adapter")), logits(loaded_by_us(adapter))) < SAME


def test_the_parameters_are_counted(recipe, lora):
    path = recipe()
    plain, more = (
        lora("count-params", path, *extra, "--json").json for extra in ([], ["lora.trainable_token_indices=[5, 9]"])
    )
    assert more["learnable"] - plain["learnable"] == 2 * 32
