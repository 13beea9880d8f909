"""The table of servers: what each refuses, the scale each would use, and the flags it needs."""

from __future__ import annotations

import math

import pytest

from lora_cli.adapters.servers import SERVERS, Files, max_lora_rank, strict_errors, verdict

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")


def files(rank: int = 4, ranks: dict[str, int] | None = None, extra: tuple[str, ...] = (), **config) -> Files:
    shapes: dict[str, tuple[int, ...]] = {}
    for module in MODULES:
        r = (ranks or {}).get(module, rank)
        shapes[f"base_model.model.{module}.lora_A.weight"] = (r, 32)
        shapes[f"base_model.model.{module}.lora_B.weight"] = (48, r)
    shapes |= dict.fromkeys(extra, (48,))
    return Files({"r": rank, "lora_alpha": rank} | config, shapes)


@pytest.mark.parametrize("server", SERVERS)
def test_a_plain_adapter_is_served_by_all_and_strictly_right(server):
    assert verdict(server, files()).is_served
    assert str(verdict(server, files())) == "serves it"
    assert strict_errors(server, files()) == []


@pytest.mark.parametrize(
    ("config", "extra", "word", "refusing"),
    [
        ({"use_dora": True}, (), "DoRA", {"vllm", "sglang", "llama.cpp"}),
        ({}, (f"base_model.model.{MODULES[0]}.lora_magnitude_vector",), "DoRA", {"vllm", "sglang", "llama.cpp"}),
        ({"modules_to_save": ["score"]}, (), "score", {"sglang", "llama.cpp"}),
        ({}, ("base_model.model.score.weight",), "score", {"sglang", "llama.cpp"}),
        ({"modules_to_save": ["lm_head"]}, (), "lm_head", {"vllm", "sglang", "llama.cpp"}),
        ({"bias": "all"}, (), "biases", {"vllm", "sglang", "llama.cpp"}),
        ({}, ("base_model.model.model.embed_tokens.lora_embedding_A",), "embeddings", {"vllm", "sglang", "llama.cpp"}),
    ],
)
def test_what_is_more_than_low_rank_is_refused(config, extra, word, refusing):
    found = {server: verdict(server, files(**config, extra=extra)) for server in SERVERS}
    assert {server for server, v in found.items() if any(word in reason for reason in v.refuses)} == refusing
    assert all(strict_errors(server, files(**config, extra=extra)) for server in refusing)


ONE = {MODULES[0]: 8}


@pytest.mark.parametrize(
    ("config", "ranks", "misreading"),
    [
        ({}, {}, set()),
        ({"lora_alpha": 32}, {}, set()),
        ({"alpha_pattern": ONE}, {}, {"vllm", "sglang", "llama.cpp"}),
        ({"rank_pattern": ONE}, ONE, {"vllm", "sglang"}),  # llama.cpp divides by the tensor's own rank
        ({"use_rslora": True}, {}, {"sglang", "llama.cpp"}),
        ({"alpha_pattern": {MODULES[0]: 4}}, {}, set()),  # a pattern that says nothing new
    ],
)
def test_a_server_that_does_not_read_a_key_misreads_the_scale(config, ranks, misreading):
    found = {server: verdict(server, files(ranks=ranks, **config)) for server in SERVERS}
    assert {server for server, v in found.items() if v.misreads} == misreading
    for server in misreading:
        assert next(iter(config)) in found[server].misreads[0]


def test_the_scales_are_those_of_the_servers_own_formulas():
    stabilised = files(rank=4, use_rslora=True, lora_alpha=6)
    scales = {name: server.scale(stabilised, MODULES[0], 4) for name, server in SERVERS.items()}
    assert scales == {"peft": 3.0, "vllm": 6 / math.sqrt(4), "sglang": 1.5, "llama.cpp": 1.5}


@pytest.mark.parametrize(("rank", "allowed"), [(1, 16), (16, 16), (17, 32), (64, 64), (257, 320), (513, None)])
def test_vllm_s_ranks(rank, allowed):
    assert max_lora_rank(rank) == allowed


def test_a_higher_rank_needs_a_flag_and_past_the_last_is_refused():
    assert str(verdict("vllm", files(rank=24))) == "serves it; needs --max-lora-rank 32 (16 unless set)"
    assert "rank 600 (at most 512)" in str(verdict("vllm", files(rank=600)))
    assert verdict("llama.cpp", files(rank=600)).is_served


@pytest.mark.parametrize("server", SERVERS)
def test_the_strict_reader_finds_what_is_not_plain(server):
    for wrong in (
        files(lora_alpha=8),
        files(use_rslora=True),
        files(rank_pattern=ONE, ranks=ONE),
        files(ranks=ONE),
        files(extra=("base_model.model.score.weight",)),
    ):
        assert strict_errors(server, wrong)
    lone = files()
    lone.shapes.pop(f"base_model.model.{MODULES[1]}.lora_B.weight")
    assert strict_errors(server, lone)
    foreign = Files(lone.config, {"transformer." + name: shape for name, shape in files().shapes.items()})
    assert strict_errors(server, foreign)


def test_a_classifiers_head_needs_a_newer_vllm_and_is_exported_for_none():
    head = files(modules_to_save=["score"])
    assert str(verdict("vllm", head)) == "serves it; needs version 0.33, which reads modules_to_save: score"
    assert strict_errors("vllm", head)
