"""A step rehearsed on the meta device, against what the real step keeps for its backward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lora_cli.adapters.initialisation import initialise
from lora_cli.adapters.injection import adapters_of
from lora_cli.commands.trainable import prepare
from lora_cli.data.batches import PADDED, collate
from lora_cli.data.encoding import Example
from lora_cli.fusion.network import Network
from lora_cli.fusion.outline import outline_batch, outline_network
from lora_cli.fusion.proof import build_network
from lora_cli.fusion.recompute import checkpoint_activations
from lora_cli.models import empty_model
from lora_cli.recipe import LoraSection, Recipe
from lora_cli.tasks import TASKS
from lora_cli.training.rehearsal import LiveBytes, StepBytes, rehearse_evaluation, rehearse_step
from tests.conftest import tiny_config, tiny_model

CPU = torch.device("cpu")
LENGTHS = (61, 33, 20, 47)
TASK = {"llama": "causal_lm", "gpt2": "causal_lm", "bert": "sequence_classification"}


DROPPING = {
    "llama": {"attention_dropout": 0.1},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
}


def recipe(kind: str, drops: bool = False) -> Recipe:
    lora = {"r": 4, "lora_dropout": 0.1 if drops else 0.0}
    return Recipe.model_validate(
        {"task": TASK[kind], "model": {"path": "m"}, "dataset": {"path": ["d"]}, "lora": lora, "output_dir": "o"}
    )


def rows(kind: str) -> list[Example]:
    label = 0 if TASK[kind] == "sequence_classification" else None
    chance = np.random.default_rng(0)
    return [
        Example(
            chance.integers(5, 300, length).astype(np.int32),
            (np.arange(length) > length // 2) & (label is None),
            "x",
            label,
        )
        for length in LENGTHS
    ]


def real(kind: str, checkpointing: bool, attention: str, drops: bool = False) -> Network:
    model = tiny_model(kind, TASK[kind], **DROPPING[kind] if drops else {})
    if attention != "auto":
        model.set_attn_implementation(attention)
    prepare(model, recipe(kind, drops))
    initialise(adapters_of(model), LoraSection(), 0)
    model.train()
    if checkpointing:
        checkpoint_activations(model)
    return build_network(model, TASK[kind], attention=attention)


def rehearsed(
    kind: str, checkpointing: bool = False, attention: str = "auto", drops: bool = False, **options: Any
) -> Network:
    config = tiny_config(kind, **DROPPING[kind] if drops else {})
    model = empty_model(config, TASK[kind], dtype=torch.float32, attn_implementation=attention)
    prepare(model, recipe(kind, drops))
    model.train()
    if checkpointing:
        checkpoint_activations(model)
    return outline_network(model, TASK[kind], CPU, attention=attention, **options)


def plan_of(kind: str, network: Network) -> StepBytes:
    """The second time: the masks of attention, which stay for all later steps, are there by then."""
    batch = outline_batch(rows(kind), network.layout, CPU)
    return [rehearse_step(network, TASKS[TASK[kind]], batch, CPU) for _ in range(2)][-1]


def saved_bytes(kind: str, network: Network) -> int:
    """The memory behind everything that autograd keeps between forward and backward, parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in network.model.parameters()}
    batch = collate(rows(kind), 0, network.layout)
    found: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no address is given out twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.data_ptr() != 0:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        TASKS[TASK[kind]].loss_sum(network, batch)
    return sum(found.values())


def live_bytes(kind: str, network: Network) -> StepBytes:
    """The same account on real tensors."""
    for parameter in network.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    batch = collate(rows(kind), 0, network.layout)
    TASKS[TASK[kind]].loss_sum(network, batch)  # as in plan_of
    with LiveBytes("cpu") as memory:
        loss = TASKS[TASK[kind]].loss_sum(network, batch) / 7
        kept, forward = memory.live, memory.peak
        loss.backward()
    return StepBytes(kept, forward, memory.peak)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_what_is_kept_is_what_autograd_saves(kind, attention):
    planned = plan_of(kind, rehearsed(kind, attention=attention)).kept
    assert planned == pytest.approx(saved_bytes(kind, real(kind, False, attention)), rel=0.04)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_dropout_of_any_kind_keeps_what_was_planned(kind):
    """A byte for each number that may fall; in float32 it would be four if the mask were of its type."""
    planned = plan_of(kind, rehearsed(kind, drops=True)).kept
    assert planned == pytest.approx(saved_bytes(kind, real(kind, False, "auto", drops=True)), rel=0.04)
    assert planned > 1.05 * plan_of(kind, rehearsed(kind)).kept


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_rehearsal_weighs_what_the_step_weighs(kind, checkpointing):
    planned, found = plan_of(kind, rehearsed(kind, checkpointing)), live_bytes(kind, real(kind, checkpointing, "auto"))
    assert planned.kept == pytest.approx(found.kept, rel=0.05)
    assert planned.peak == pytest.approx(found.peak, rel=0.1)


def test_both_judge_a_model_alike():
    for kind in TASK:
        found, judged = real(kind, False, "auto"), rehearsed(kind)
        assert judged.layout == found.layout
        assert (judged.head is None) == (found.head is None)


def test_an_unfused_model_is_seen_to_keep_more():
    """The control: an account that did not follow the code would not notice. Attention keeps the same in both."""
    assert plan_of("llama", rehearsed("llama", fused=False)).kept > 1.2 * plan_of("llama", rehearsed("llama")).kept


def test_checkpointing_keeps_less_and_computes_no_less():
    plain, less = plan_of("llama", rehearsed("llama")), plan_of("llama", rehearsed("llama", checkpointing=True))
    assert less.kept < plain.kept / 3
    assert less.kept < less.peak < plain.peak


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_evaluation_takes_less_than_a_step(kind):
    for attention in ("auto", "sdpa"):
        network = rehearsed(kind, attention=attention)
        batch = outline_batch(rows(kind), network.layout, CPU)
        assert rehearse_evaluation(network, TASKS[TASK[kind]], batch, CPU) < plan_of(kind, network).peak


def test_live_bytes_follow_one_product_by_hand():
    x, w = torch.ones(8, 4, device="meta"), torch.ones(16, 4, device="meta")
    with LiveBytes("meta") as memory:
        y = F.linear(x, w)
        assert memory.live == 8 * 16 * 4
        z = y + 1
        z.mul_(2)
        assert z.view(-1).shape == (128,)
        del y
        assert (memory.live, memory.peak) == (512, 1024)


def test_padding_is_weighed_too():
    network = rehearsed("llama", attention="sdpa")
    assert network.layout == PADDED
    longest = [rows("llama")[0]] * 4
    alone = rehearse_step(network, TASKS["causal_lm"], outline_batch(longest, PADDED, CPU), CPU).kept
    assert plan_of("llama", network).kept == pytest.approx(alone, rel=0.03), "short rows take the room of the longest"
