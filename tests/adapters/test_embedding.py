"""Adapters on the input embedding: dense arithmetic, and PEFT both ways."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from lora_cli.adapters.embedding import LoRAEmbedding, is_plain_table
from lora_cli.adapters.files import read_adapter
from lora_cli.adapters.targets import find_targets
from lora_cli.errors import RecipeError, StorageError, UsageError
from lora_cli.recipe import LoraSection
from lora_cli.seeds import stream
from tests.commands.test_resume import BUSY, result_of, run, stop_after
from tests.conftest import labelled_rows, tiny_model, write_jsonl
from tests.made import base_model, distance, loaded_by_peft, loaded_by_us, logits, our_adapter, peft_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning:peft")
V, D, R, SCALING = 30, 16, 4, 1.5
UNTIED = {"tie_word_embeddings": False}
TARGETS = {"target_modules": ["embed_tokens", "q_proj"]}


def adapted(padding: int | None = None, dtype: torch.dtype = torch.float32) -> LoRAEmbedding:
    torch.manual_seed(0)
    layer = LoRAEmbedding(nn.Embedding(V, D, padding_idx=padding).to(dtype), R, SCALING)
    chance = stream(0, "embedding")
    layer.begin(torch.randn(R, V, generator=chance), torch.randn(D, R, generator=chance))
    layer.base.weight.requires_grad_(False)
    return layer


@pytest.mark.parametrize("padding", [None, 3])
def test_forward_and_gradients_are_those_of_the_dense_formula(padding):
    layer, ids = adapted(padding), torch.tensor([[1, 3, 7], [7, 29, 0]])
    dy = torch.randn(2, 3, D, generator=stream(1, "embedding"))
    layer(ids).backward(dy)
    a, b = (t.detach().double().requires_grad_(True) for t in (layer.lora_embedding_A, layer.lora_embedding_B))
    frozen = layer.base.weight.double()
    expected = F.embedding(ids, frozen) + F.embedding(ids, SCALING * (b @ a).T)
    expected.backward(dy.double())
    torch.testing.assert_close(layer(ids).double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.lora_embedding_B.grad.double(), b.grad, rtol=1e-5, atol=1e-5)
    if padding is None:
        torch.testing.assert_close(layer.lora_embedding_A.grad.double(), a.grad, rtol=1e-5, atol=1e-5)
    else:
        assert not layer.lora_embedding_A.grad[:, padding].any(), "as in PEFT, the padding's row is not trained"


def test_it_begins_as_the_table_bit_for_bit():
    layer = adapted(dtype=torch.bfloat16)
    layer.begin_at_random(stream(0, "init"))
    ids = torch.arange(V)
    assert torch.equal(layer(ids), layer.base(ids))
    assert layer.lora_embedding_B.std() > 0.5
    assert layer(ids).dtype == torch.bfloat16
    assert (layer.num_embeddings, layer.embedding_dim, layer.r, layer.file_rank) == (V, D, R, R)


@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"rank_pattern": {"embed_tokens": 2}}], ids=str)
def test_peft_reads_ours_and_gives_the_same_logits(variant, model_folder, tmp_path):
    base = model_folder("llama", **UNTIED)
    model = our_adapter(base, tmp_path / "adapter", "causal_lm", **TARGETS, **variant)
    ours, theirs = logits(model), logits(loaded_by_peft(base, tmp_path / "adapter", "causal_lm"))
    assert distance(ours, theirs) < 1e-5
    assert distance(ours, logits(base_model(base, "causal_lm"))) > 1e-2
    assert distance(ours, logits(loaded_by_us(tmp_path / "adapter"))) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_we_read_pefts_and_give_the_same_logits(kind, model_folder, tmp_path):
    base = model_folder(kind, **UNTIED)
    targets = ["embed_tokens", "q_proj"] if kind == "llama" else ["wte", "c_attn"]
    more = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    model = peft_adapter(base, tmp_path / "adapter", "causal_lm", target_modules=targets, **more)
    assert distance(logits(loaded_by_us(tmp_path / "adapter")), logits(model)) < 1e-5
    assert sum(update.is_embedding for update in read_adapter(tmp_path / "adapter").updates.values()) == 1


def test_pefts_dora_on_an_embedding_is_refused(model_folder, tmp_path):
    base = model_folder("llama", **UNTIED)
    peft_adapter(base, tmp_path / "adapter", "causal_lm", target_modules=["embed_tokens", "q_proj"], use_dora=True)
    with pytest.raises(UsageError, match=r"adapts the embedding model.embed_tokens with DoRA"):
        read_adapter(tmp_path / "adapter")


def test_pefts_adapter_on_one_table_of_a_tied_pair_is_refused(model_folder, lora, tmp_path):
    base = model_folder("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_adapter(base, tmp_path / "adapter", "causal_lm", target_modules=["embed_tokens", "q_proj"])
    refused = lora("merge", tmp_path / "adapter", "-o", tmp_path / "merged")
    assert refused.code == 2
    assert "was trained with model.embed_tokens adapted, which shares its weight with lm_head" in refused.err


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"use_dora": True}, ("lora", "use_dora"), "cannot be combined with an adapter on model.embed_tokens"),
        ({"r": 33}, ("lora", "r"), "33 is more than the rank of model.embed_tokens (32 x 320)"),
    ],
)
def test_what_is_refused(changes, path, message):
    model = tiny_model("llama", **UNTIED)
    with pytest.raises(RecipeError) as caught:
        find_targets(model, LoraSection(**{"target_modules": ["embed_tokens"]} | changes), [])
    mistake = next(mistake for mistake in caught.value.mistakes if mistake.path == path)
    assert message in mistake.message


def test_a_tied_pair_is_refused_with_the_ways_out():
    with pytest.raises(RecipeError) as caught:
        find_targets(tiny_model("llama"), LoraSection(target_modules=["embed_tokens"]), [])
    (mistake,) = caught.value.mistakes
    assert mistake.path == ("lora", "target_modules")
    assert "shares its weight with lm_head: an update would untie them" in mistake.message
    assert (
        mistake.help == "use lora.modules_to_save: [embed_tokens] or lora.trainable_token_indices: both keep them tied"
    )


@pytest.mark.parametrize("pattern", ["all-linear", "*", "re:.*"])
def test_no_glob_takes_the_embedding_along(pattern):
    model = tiny_model("llama", **UNTIED)
    targets = find_targets(model, LoraSection(target_modules=pattern), [])
    assert len(targets) == 14 and not any(target.is_embedding for target in targets)


def test_a_table_that_does_more_than_looking_up_is_told():
    assert is_plain_table(nn.Embedding(4, 4))
    assert not is_plain_table(nn.Embedding(4, 4, max_norm=1.0))
    assert not is_plain_table(nn.Linear(4, 4))


def test_rows_of_an_adapted_table_are_refused(recipe, model_folder, lora):
    changes = {"lora.target_modules": ["embed_tokens"], "lora.trainable_token_indices": [5]}
    refused = lora("check", recipe(**{"model.path": str(model_folder("llama", **UNTIED))} | changes))
    assert refused.code == 2
    assert "trains rows of model.embed_tokens, which has an adapter" in refused.err


@pytest.mark.parametrize("beginning", [True, "gaussian", "orthogonal", "pissa", "olora", "eva", "lora_ga", "loftq"])
def test_a_run_goes_on_merges_and_is_read_by_peft(beginning, recipe, model_folder, lora, tmp_path):
    base = model_folder("llama", **UNTIED)
    changes = {"model.path": str(base), "lora.target_modules": ["embed_tokens", "q_proj", "up_proj"]}
    path = recipe(**(BUSY | changes | {"lora.init_lora_weights": beginning, "lora.lora_dropout": 0.0}))
    stop_after(path, 3)
    run(path)
    adapter = tmp_path / "run" / "adapter"
    interrupted = result_of(tmp_path / "run")
    run(path, fresh=True)
    assert result_of(tmp_path / "run") == interrupted
    ours = logits(loaded_by_us(adapter))
    assert read_adapter(adapter).updates["model.embed_tokens"].lora_A.any(), "it was trained"
    merged = lora("merge", adapter, "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), ours) < 2e-5
    if beginning != "loftq":  # whose backbone is read in tests/commands/test_loftq.py
        assert distance(logits(loaded_by_peft(base, adapter, "causal_lm")), ours) < 1e-5


def test_a_classifiers_embedding(recipe, model_folder, lora, tmp_path):
    base = model_folder("roberta", "sequence_classification")
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(16))
    changes = {"task": "sequence_classification", "dataset.path": str(rows), "model.path": str(base)}
    run(recipe(**(changes | {"lora.target_modules": ["word_embeddings", "query"], "training.max_steps": 2})))
    adapter = tmp_path / "run" / "adapter"
    theirs = logits(loaded_by_peft(base, adapter, "sequence_classification"))
    assert distance(logits(loaded_by_us(adapter)), theirs) < 1e-5


@pytest.mark.parametrize("command", ["shrink", "combine", "export"])
def test_work_on_files_is_refused_by_name(command, model_folder, lora, tmp_path):
    our_adapter(model_folder("llama", **UNTIED), tmp_path / "adapter", "causal_lm", **TARGETS)
    more = {"shrink": ["--rank", 2], "combine": [tmp_path / "adapter", "--weights", "1,1"], "export": ["--for", "vllm"]}
    refused = lora(command, tmp_path / "adapter", *more[command], "-o", tmp_path / "out")
    assert refused.code == 2
    assert "adapts an embedding (model.embed_tokens)" in refused.err
    assert "lora merge" in refused.err


def test_an_adapter_that_learned_nothing_is_not_delivered(recipe, model_folder, monkeypatch, tmp_path):
    """B begins at random: it is A that shows whether anything was learned."""
    monkeypatch.setattr("lora_cli.training.optimizer.FlatAdamW.update", lambda self, finite: None)
    changes = {"model.path": str(model_folder("llama", **UNTIED)), "lora.target_modules": ["embed_tokens"]}
    with pytest.raises(StorageError, match="is zero after training"):
        run(recipe(**(changes | {"training.max_steps": 1})))


def test_inspect_shows_it_and_what_servers_say(model_folder, lora, tmp_path):
    our_adapter(model_folder("llama", **UNTIED), tmp_path / "adapter", "causal_lm", **TARGETS)
    shown = lora("inspect", tmp_path / "adapter", "--json").json
    table = next(module for module in shown["modules"] if module["name"] == "model.embed_tokens")
    assert (table["in_features"], table["out_features"], table["rank"]) == (320, 32, 4)
    said = {verdict["server"]: verdict["refuses"] for verdict in shown["servers"]}
    assert said["vllm"] == said["sglang"] == ["adapted embeddings"]


def test_peft_begins_it_alike(model_folder):
    """Zero and normal: the same parameter of each is the zero one."""
    model = base_model(model_folder("llama", **UNTIED), "causal_lm")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, config).base_model.model.model.embed_tokens
    assert not theirs.lora_embedding_A["default"].any()
    assert theirs.lora_embedding_B["default"].detach().std() == pytest.approx(1, abs=0.3)


def test_layers_cannot_be_chosen_beside_it():
    section = LoraSection(target_modules=["embed_tokens", "q_proj"], layers_to_transform=[0])
    with pytest.raises(RecipeError, match=r"cannot be combined with an adapter on model.embed_tokens"):
        find_targets(tiny_model("llama", **UNTIED), section, [])


def test_lora_plus_leaves_it_at_the_common_rate_and_a_bypassed_one_is_told(recipe, model_folder, monkeypatch):
    monkeypatch.setattr(LoRAEmbedding, "forward", lambda self, ids: self.base(ids))
    changes = {"model.path": str(model_folder("llama", **UNTIED)), "lora.target_modules": ["embed_tokens", "q_proj"]}
    with pytest.raises(UsageError, match=r"get no gradient.*model.embed_tokens"):
        run(recipe(**changes))


def test_a_table_that_scales_scales_the_update_alike(tmp_path, tokenizer):
    """Gemma's: base + update, times the root of the hidden size; as PEFT has it."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320, "tie_word_embeddings": False}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **sizes))
    assert hasattr(model.get_input_embeddings(), "embed_scale")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ours = our_adapter(tmp_path / "base", tmp_path / "adapter", "causal_lm", **TARGETS)
    theirs = loaded_by_peft(tmp_path / "base", tmp_path / "adapter", "causal_lm")
    assert distance(logits(ours), logits(theirs)) < 1e-5
    ours.get_input_embeddings().scaled = lambda x: x  # the control
    assert distance(logits(ours), logits(theirs)) > 1e-3
