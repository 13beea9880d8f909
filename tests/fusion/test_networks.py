"""The fast way of running a model against its own code: row by row, without padding, in float64.

Loss and every gradient, for architectures of many kinds; and which way each of them takes.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lora_cli.adapters.initialisation import initialise
from lora_cli.adapters.injection import adapters_of, attach, freeze_base
from lora_cli.adapters.layer import projection_of
from lora_cli.adapters.targets import find_targets
from lora_cli.data.batches import PADDED, collate
from lora_cli.data.encoding import Example
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_network
from lora_cli.models import head_modules, heed_soft_cap
from lora_cli.recipe import LoraSection
from lora_cli.tasks import TASKS
from lora_cli.training.optimizer import trained_parameters
from tests.conftest import AUTO

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8}
WINDOW = 6  # shorter than the rows, and longer than the proof's
ATTENTION, GATED, NORM = "attention", "gated", "norm"
# kind -> (configuration, whether rows lie end to end, the fused forms that are adopted)
CAUSAL: dict[str, tuple[dict[str, Any], bool, set[str]]] = {
    "llama": (GROUPED, True, {ATTENTION, GATED, NORM}),
    "mistral": (GROUPED | {"sliding_window": WINDOW}, True, {ATTENTION, GATED, NORM}),
    "qwen2": (GROUPED, True, {ATTENTION, GATED, NORM}),
    "qwen3": (GROUPED | {"head_dim": 8}, True, {ATTENTION, GATED, NORM}),
    "gemma": (GEMMA, True, {ATTENTION, GATED, NORM}),
    "gemma2": (GEMMA | {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0}, True, {ATTENTION, GATED, NORM}),
    "gemma3_text": (GEMMA | {"sliding_window": WINDOW}, True, {ATTENTION, GATED, NORM}),
    "phi3": (GROUPED, True, {NORM}),
    "olmo2": (GROUPED, True, {ATTENTION, GATED, NORM}),
    "smollm3": (GROUPED | {"no_rope_layer_interval": 2}, True, {ATTENTION, GATED, NORM}),
    "granite": (GROUPED | {"logits_scaling": 4.0}, True, {ATTENTION, GATED, NORM}),
    "cohere": (GROUPED | {"logit_scale": 0.25}, True, {GATED}),
    "mixtral": (EXPERTS, True, {ATTENTION, NORM}),
    "qwen3_moe": (EXPERTS | {"head_dim": 8}, True, {ATTENTION, NORM}),
    "gpt_neox": (SMALL, True, set()),
    "gpt2": ({"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, True, set()),
    "opt": (SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}, True, set()),
    "falcon": (SMALL, False, set()),
    "bloom": (SMALL | {"n_head": 4, "n_layer": 2}, False, set()),
    "gpt_oss": (EXPERTS | {"head_dim": 8, "sliding_window": WINDOW}, False, {NORM}),
}
CLASSIFIERS: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": (GROUPED, True),
    "gpt2": (CAUSAL["gpt2"][0], True),
    "bert": (SMALL, True),
    "roberta": (SMALL | {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 66}, True),
    "electra": (SMALL | {"embedding_size": 32}, True),
    "modernbert": (SMALL | {"local_attention": 2 * WINDOW}, True),
    "albert": (SMALL | {"embedding_size": 32}, True),
    "distilbert": ({"vocab_size": 120, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, True),
    "deberta-v2": (SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, False),
}
LOOKS_AT = {"llama": "last", "gpt2": None, "albert": None}  # GPT-2 shapes its output anew; ALBERT has one layer
LENGTHS = [(17, 3), (4, 1), (30, 12), (2, 1), (9, 8)]  # (tokens, of them prompt)


def example(index: int, length: int, prompt: int, label: int | None) -> Example:
    ids = np.random.default_rng(index).integers(3, 120, length).astype(np.int32)
    return Example(ids, (np.arange(length) >= prompt) & (label is None), f"row {index}", label)


def rows_of(task: str) -> list[Example]:
    labelled = task == "sequence_classification"
    return [example(i, *lengths, i % 2 if labelled else None) for i, lengths in enumerate(LENGTHS)]


def adapted(kind: str, task: str, values: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A random model with adapters whose B is not zero, without dropout."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **values)
    for name in list(vars(config)):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    model = AUTO[task].from_config(config)
    heed_soft_cap(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(torch.rand_like(parameter) * 0.5)
    model.to(dtype)
    saved = head_modules(model, task)
    attach(model, find_targets(model, LoraSection(r=3, lora_alpha=5), saved))
    freeze_base(model, saved)
    initialise(adapters_of(model), LoraSection(), 0)
    for layer in adapters_of(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model.train()


def loss_and_gradients(network: Network, task: str, rows: list[Example]) -> dict[str, Tensor]:
    network.model.zero_grad()
    loss = TASKS[task].loss_sum(network, collate(rows, 0, network.layout))
    loss.backward()
    found = {name: p.grad.double() for name, p in trained_parameters(network.model).items() if p.grad is not None}
    return found | {"loss": loss.detach().double()}


def reference(model: Any, task: str, rows: list[Example]) -> dict[str, Tensor]:
    """The model's own code in float64, one row after another."""
    model = copy.deepcopy(model).double()
    if getattr(model.config, "num_experts_per_tok", None):
        model.set_experts_implementation("eager")  # the grouped products know no float64
    total: dict[str, Tensor] = {}
    for row in rows:
        for name, value in loss_and_gradients(Network(model), task, [row]).items():
            total[name] = total[name] + value if name in total else value.clone()
    return total


def worst(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to the largest gradient (a zero one has no size of its own)."""
    assert ours.keys() == exact.keys()
    size = max(float(g.norm()) for name, g in exact.items() if name != "loss")
    gradients = max(float((ours[name] - exact[name]).norm()) / size for name in exact if name != "loss")
    return max(gradients, float(abs(ours["loss"] - exact["loss"]) / exact["loss"]))


def forms_in(model: nn.Module) -> set[str]:
    return {m.forward.func.__name__.lstrip("_") for m in model.modules() if "forward" in vars(m)} - {"run", "drop"}


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_language_model_s_loss_and_gradients_are_its_own(kind: str):
    values, end_to_end, forms = CAUSAL[kind]
    model, rows = adapted(kind, "causal_lm", values), rows_of("causal_lm")
    exact = reference(model, "causal_lm", rows)
    network = build_network(model, "causal_lm")
    assert network.end_to_end is end_to_end, network.notes
    assert forms_in(model) == forms
    assert (network.layout.looks_at == "targets") is (end_to_end and kind != "gpt2"), "which shapes its output anew"
    assert (len(network.notes) > 0) is not end_to_end, "a slower way is said"
    assert worst(loss_and_gradients(network, "causal_lm", rows), exact) < 1e-5


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_s_loss_and_gradients_are_its_own(kind: str):
    values, end_to_end = CLASSIFIERS[kind]
    task = "sequence_classification"
    model, rows = adapted(kind, task, values), rows_of(task)
    exact = reference(model, task, rows)
    network = build_network(model, task)
    assert network.end_to_end is end_to_end, network.notes
    assert network.layout.looks_at == LOOKS_AT.get(kind, "first" if end_to_end else None)
    assert worst(loss_and_gradients(network, task, rows), exact) < 1e-5


def test_the_windows_of_these_tests_are_shorter_than_their_rows():
    """The negative control of the claims above: without its window Mistral is another model."""
    rows = rows_of("causal_lm")
    with_window = adapted("mistral", "causal_lm", CAUSAL["mistral"][0])
    without = adapted("mistral", "causal_lm", CAUSAL["mistral"][0] | {"sliding_window": None})
    exact = reference(with_window, "causal_lm", rows)
    assert worst(loss_and_gradients(build_network(without, "causal_lm"), "causal_lm", rows), exact) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mixtral"])
def test_in_bfloat16_it_is_no_less_exact_than_the_model_s_own_code(kind: str):
    """Both against the same weights in float64."""
    model, rows = adapted(kind, "causal_lm", CAUSAL[kind][0], torch.bfloat16), rows_of("causal_lm")
    for layer in adapters_of(model).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    exact = reference(model, "causal_lm", rows)
    own = loss_and_gradients(Network(model), "causal_lm", rows)
    ours = loss_and_gradients(build_network(model, "causal_lm"), "causal_lm", rows)
    sizes = sum(float(g.norm()) for g in exact.values())
    errors = [sum(float((g[name] - exact[name]).norm()) for name in exact) / sizes for g in (ours, own)]
    assert errors[0] < 1.25 * errors[1]
    assert errors[0] < 0.05


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal_lm"), ("bert", "sequence_classification")])
def test_a_line_that_is_filled_up_gives_the_same(kind: str, task: str):
    values = (CAUSAL if task == "causal_lm" else CLASSIFIERS)[kind][0]
    network, rows = build_network(adapted(kind, task, values), task), rows_of(task)
    filled = replace(network, layout=replace(network.layout, multiple=6))
    assert sum(length for length, _ in LENGTHS) % 6 != 0
    assert collate(rows, 0, filled.layout).input_ids.shape[1] % 6 == 0
    assert worst(loss_and_gradients(filled, task, rows), loss_and_gradients(network, task, rows)) < 1e-6


def with_prefix(length: int) -> list[Example]:
    """The rows behind a beginning in common, as of a system prompt."""
    begin = np.random.default_rng(9).integers(3, 120, length).astype(np.int32)
    return [
        replace(
            row,
            input_ids=np.concatenate([begin, row.input_ids]),
            supervised=np.concatenate([np.zeros(length, dtype=bool), row.supervised]),
        )
        for row in rows_of("causal_lm")
    ]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "qwen3", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("multiple", [1, 7])
def test_a_shared_prefix_is_computed_once_and_loss_and_gradients_stay_the_rows_own(kind: str, multiple: int):
    model, rows = adapted(kind, "causal_lm", CAUSAL[kind][0]), with_prefix(20)
    exact = reference(model, "causal_lm", rows)
    network = build_network(model, "causal_lm")
    assert network.layout.share > 0
    network = replace(network, layout=replace(network.layout, multiple=multiple))
    batch = collate(rows, 0, network.layout)
    assert batch.rows.prefix >= 20
    assert batch.input_ids.shape[1] < sum(len(row.input_ids) for row in rows) - 3 * 20
    assert worst(loss_and_gradients(network, "causal_lm", rows), exact) < 1e-5


def test_rows_are_told_apart_behind_a_shared_prefix():
    """The negative control: with other tokens in the prefix of one row, nothing is shared, and the loss differs."""
    network, rows = build_network(plain(), "causal_lm"), with_prefix(20)
    shared = loss_and_gradients(network, "causal_lm", rows)["loss"]
    changed = [replace(rows[0], input_ids=rows[0].input_ids[::-1].copy()), *rows[1:]]
    assert collate(changed, 0, network.layout).rows.prefix == 0
    assert abs(loss_and_gradients(network, "causal_lm", changed)["loss"] - shared) > 0.1


def test_a_kernel_that_is_asked_for_keeps_rows_padded_and_other_forms():
    model = adapted("llama", "causal_lm", GROUPED)
    network = build_network(model, "causal_lm", attention="sdpa")
    assert network.layout == PADDED
    assert forms_in(model) == {GATED, NORM}
    rows = rows_of("causal_lm")
    assert worst(loss_and_gradients(network, "causal_lm", rows), reference(plain(), "causal_lm", rows)) < 1e-5


def plain() -> Any:
    return adapted("llama", "causal_lm", GROUPED)


def test_without_fusion_the_model_s_own_code_runs():
    model = plain()
    network = build_network(model, "causal_lm", fused=False)
    assert (forms_in(model), network.head, network.end_to_end) == (set(), None, True)


@pytest.mark.parametrize("trained", ["lm_head", "embed_tokens", "norm", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_trained_in_full_get_their_gradient(trained: str, dtype: torch.dtype):
    """In float32 inside a bfloat16 model, through hooks: such a module keeps its own code."""

    def build() -> Any:
        torch.manual_seed(0)
        model = AUTO["causal_lm"].from_config(AutoConfig.for_model("llama", **GROUPED)).to(dtype)
        saved = [name for name, _ in model.named_modules() if name.endswith(trained)]
        attach(model, find_targets(model, LoraSection(r=2, target_modules=["q_proj", "v_proj"]), saved))
        freeze_base(model, saved)
        initialise(adapters_of(model), LoraSection(), 0)
        return model.train()

    rows = rows_of("causal_lm")
    ours = loss_and_gradients(build_network(build(), "causal_lm"), "causal_lm", rows)
    own = loss_and_gradients(Network(build()), "causal_lm", rows)
    assert any(trained in name for name in ours)
    assert worst(ours, own) < (1e-5 if dtype == torch.float32 else 0.05)


def test_dropout_in_an_adapter_or_the_model_is_kept():
    model = plain()
    for layer in adapters_of(model).values():
        layer.dropout = nn.Dropout(0.5)
    network, rows = build_network(model, "causal_lm"), rows_of("causal_lm")
    assert GATED in forms_in(model)
    assert network.layout.share == 0, "each row drops for itself, also in what it shares"
    one, other = (loss_and_gradients(network, "causal_lm", rows)["loss"] for _ in range(2))
    assert one != other
    config = GROUPED | {"attention_dropout": 0.5}
    network = build_network(adapted_with_attention_dropout(config), "causal_lm")
    one, other = (loss_and_gradients(network, "causal_lm", rows)["loss"] for _ in range(2))
    assert one != other


def adapted_with_attention_dropout(values: dict[str, Any]) -> Any:
    model = adapted("llama", "causal_lm", values)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    return model


def test_a_model_whose_forms_lie_keeps_its_own_code(monkeypatch):
    """The proof is a real one: a form that is wrong by a percent is not adopted."""
    from lora_cli.fusion import forms

    true_norm = forms.rms_norm
    monkeypatch.setattr(forms, "rms_norm", lambda *arguments: true_norm(*arguments) * 1.01)
    model = plain()
    build_network(model, "causal_lm")
    assert NORM not in forms_in(model)
    assert GATED in forms_in(model)


def test_a_model_that_mixes_rows_is_run_padded(monkeypatch):
    """As one would that did not hand the rows' lengths on to its attention."""
    from lora_cli.fusion import attention

    true_attention = attention.attend_rows

    def leaking(query, key, value, rows, sight, dropout):
        from lora_cli.ops.rows import Rows

        return true_attention(query, key, value, Rows.of([rows.num_tokens]), sight, dropout)

    monkeypatch.setattr(attention, "attend_rows", leaking)
    network = build_network(plain(), "causal_lm")
    assert not network.end_to_end
    assert "does not keep rows apart" in network.notes[0]


def test_what_is_more_than_a_frozen_linear_layer_is_no_projection():
    linear = nn.Linear(4, 3)
    assert projection_of(linear) is None, "it is trained"
    linear.requires_grad_(False)
    assert projection_of(linear) is not None
    linear.register_forward_hook(lambda *_: None)
    assert projection_of(linear) is None, "a hook takes part"
    assert projection_of(nn.Identity()) is None
