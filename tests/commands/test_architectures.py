"""Train, save, merge and compare, for architectures of many shapes: what holds for Llama holds for them."""

from __future__ import annotations

import pytest

from tests.conftest import chat_rows, labelled_rows, write_jsonl

DECODER = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = DECODER | {"num_key_value_heads": 2}
CAUSAL = {
    "mistral": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 16},
    "phi3": GROUPED | {"pad_token_id": 0},
    "gpt_neox": DECODER,
    "opt": {
        "vocab_size": 320,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "falcon": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "cohere": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 4},
    "gpt2": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4},
}
CLASSIFIERS = {
    "llama": GROUPED,
    "gpt2": CAUSAL["gpt2"],
    "distilbert": {"vocab_size": 320, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "deberta-v2": DECODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "modernbert": DECODER | {"pad_token_id": 0},
    "albert": DECODER | {"embedding_size": 32},
}


@pytest.fixture
def tokenizer_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_lm_trains_and_merges(kind, recipe, lora, tmp_path, tokenizer_folder):
    changes = {"model": {"config": {"model_type": kind} | CAUSAL[kind], "tokenizer": str(tokenizer_folder)}}
    _train_and_merge(recipe(rows=12, **changes, **{"training.max_steps": 2}), lora, tmp_path)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifier_trains_and_merges(kind, recipe, lora, tmp_path, tokenizer_folder):
    changes = {
        "task": "sequence_classification",
        "model": {"config": {"model_type": kind} | CLASSIFIERS[kind], "tokenizer": str(tokenizer_folder)},
        "dataset.path": str(write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(12))),
        "training.max_steps": 2,
    }
    _train_and_merge(recipe(**changes), lora, tmp_path)


def _train_and_merge(path, lora, tmp_path):
    """The adapter moves the base, and the merged model is base + adapter to float32 rounding."""
    trained = lora("train", path, "model.dtype=float32", "dataset.eval_size=2", "--json")
    assert trained.code == 0, trained.err
    merged = lora("merge", tmp_path / "run" / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    report = merged.json
    assert report["adapter_mean_kl"] > 1e-7
    assert report["agreement"]["max_abs_difference"] < 1e-5
    assert report["agreement"]["mean_kl"] < report["adapter_mean_kl"] / 1000


def test_chat_rows_fit_the_vocabulary(tokenizer):
    """The negative control of these tests' own material: no id is outside the tiny models' embeddings."""
    text = " ".join(message["content"] for row in chat_rows(24) for message in row["messages"])
    assert max(tokenizer(text)["input_ids"]) < DECODER["vocab_size"]
