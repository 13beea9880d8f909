"""The last layer on what is looked at alone: how much less it runs, that nothing changes, and where it is not done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_cli.data.batches import Layout, collate
from lora_cli.data.encoding import Example
from lora_cli.fusion.ending import last_layer, lengthen, shorten
from lora_cli.fusion.layers import repeated_layers
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_network
from lora_cli.tasks import TASKS
from tests.fusion.test_networks import (
    CAUSAL,
    CLASSIFIERS,
    LENGTHS,
    adapted,
    loss_and_gradients,
    reference,
    rows_of,
    worst,
)

CLASSIFY = "sequence_classification"
LINE = Layout(end_to_end=True, looks_at="targets")


def without(network: Network) -> Network:
    return replace(network, layout=replace(network.layout, looks_at=None))


def row(length: int, targets: list[int]) -> Example:
    return Example(np.arange(length, dtype=np.int32), np.isin(np.arange(length), targets), "row")


def tokens_seen(network: Network, task: str, rows: list[Example]) -> list[int]:
    """By the part behind attention of each layer."""
    seen: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
        for layer in repeated_layers(network.model).values()
    ]
    with torch.no_grad():
        TASKS[task].loss_sum(network, collate(rows, 0, network.layout))
    for hook in hooks:
        hook.remove()
    return seen


def test_each_row_is_looked_at_from_where_its_first_target_is_predicted():
    batch = collate([row(6, [4, 5]), row(3, [1]), row(4, [])], 0, LINE)
    assert batch.ending is not None
    assert batch.ending.places.tolist() == [3, 4, 5, 6, 7, 8, 12], "of a row without targets its last token"
    assert batch.ending.places[batch.ending.wanted].tolist() == batch.places.tolist() == [3, 4, 6]
    rows = batch.ending.rows
    assert (rows.lengths, rows.key_lengths, rows.offsets) == ((3, 3, 1), (6, 3, 4), (3, 0, 3))
    assert rows.bounds.tolist() == [0, 3, 6, 7]
    assert rows.end_with_their_keys


def test_behind_a_shared_prefix_it_is_what_a_row_has_of_its_own():
    ids = [[7, 8, 9, 1, 2, 3], [7, 8, 9, 4, 5, 6]]
    rows = [Example(np.array(i, dtype=np.int32), np.arange(6) == 5, "row") for i in ids]
    batch = collate(rows, 0, replace(LINE, share=1))
    assert batch.rows.prefix == 3 and batch.ending is not None
    assert batch.ending.places.tolist() == [2, 4, 5, 7, 8]
    assert batch.ending.rows.offsets == (2, 4, 4)
    assert batch.ending.places[batch.ending.wanted].tolist() == batch.places.tolist()


@pytest.mark.parametrize(("looks_at", "places"), [("first", [0, 3, 8]), ("last", [2, 7, 11])])
def test_of_a_classifier_s_row_it_is_one_token(looks_at, places):
    rows = [replace(row(length, []), label=0) for length in (3, 5, 4)]
    batch = collate(rows, 0, replace(LINE, looks_at=looks_at))
    assert batch.ending is not None
    assert batch.ending.places.tolist() == batch.ending.places[batch.ending.wanted].tolist() == places


def test_nothing_ends_early_where_little_is_spared():
    assert collate([row(12, list(range(1, 12)))], 0, LINE).ending is None
    assert collate([row(12, list(range(3, 12)))], 0, LINE).ending is None, "two tokens of twelve"
    assert collate([row(12, list(range(4, 12)))], 0, LINE).ending is not None


def test_where_products_like_round_sizes_it_has_one():
    rows = [row(60, [59]), row(40, list(range(10, 40)))]
    batch = collate(rows, 0, replace(LINE, multiple=2))
    assert batch.ending is not None
    assert batch.ending.rows.lengths == (3, 31), "one more ahead of the first row's two"
    assert batch.ending.places[batch.ending.wanted].tolist() == batch.places.tolist()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_the_last_layer_alone_runs_on_fewer_tokens(kind):
    network = build_network(adapted(kind, "causal_lm", CAUSAL[kind][0]), "causal_lm")
    tokens, looked_at = sum(n for n, _ in LENGTHS), sum(n - max(prompt - 1, 0) for n, prompt in LENGTHS)
    assert tokens_seen(network, "causal_lm", rows_of("causal_lm")) == [tokens, looked_at]
    assert tokens_seen(without(network), "causal_lm", rows_of("causal_lm")) == [tokens, tokens]


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_a_classifier_s_runs_on_one_token_a_row(kind):
    network = build_network(adapted(kind, CLASSIFY, CLASSIFIERS[kind][0]), CLASSIFY)
    assert tokens_seen(network, CLASSIFY, rows_of(CLASSIFY)) == [sum(n for n, _ in LENGTHS), len(LENGTHS)]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "olmo2", "qwen3_moe"])
def test_behind_a_shared_prefix_loss_and_gradients_stay_the_rows_own(kind):
    model = adapted(kind, "causal_lm", CAUSAL[kind][0])
    begin = np.arange(3, 20, dtype=np.int32)
    rows = [
        replace(
            some,
            input_ids=np.concatenate([begin, some.input_ids]),
            supervised=np.concatenate([np.zeros(len(begin), dtype=bool), some.supervised]),
        )
        for some in rows_of("causal_lm")
    ]
    exact = reference(model, "causal_lm", rows)
    network = build_network(model, "causal_lm")
    network = replace(network, layout=replace(network.layout, share=1))
    batch = collate(rows, 0, network.layout)
    assert batch.rows.prefix >= len(begin) and batch.ending is not None
    assert worst(loss_and_gradients(network, "causal_lm", rows), exact) < 1e-5


@pytest.mark.parametrize("task", ["causal_lm", CLASSIFY])
def test_an_evaluation_s_sums_are_the_same(task):
    short, rows = build_network(adapted("llama", task, CAUSAL["llama"][0]), task), rows_of(task)
    found, expected = (TASKS[task].sums(n, collate(rows, 0, n.layout)) for n in (short, without(short)))
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.allclose(found[name].double(), expected[name].double(), rtol=1e-6)


def test_a_head_that_reads_every_token_is_given_every_token():
    """ModernBERT may average its states; the control is that its other heads end early (``test_networks``)."""
    model = adapted("modernbert", CLASSIFY, CLASSIFIERS["modernbert"][0] | {"classifier_pooling": "mean"})
    rows = rows_of(CLASSIFY)
    exact = reference(model, CLASSIFY, rows)
    network = build_network(model, CLASSIFY)
    assert network.layout.looks_at is None
    assert worst(loss_and_gradients(network, CLASSIFY, rows), exact) < 1e-5


def test_where_the_last_layer_is_skipped_at_random_the_right_tokens_are_read():
    """OPT leaves layers out while it trains, if its configuration says so."""
    model = adapted("opt", "causal_lm", CAUSAL["opt"][0])
    network, rows = build_network(model, "causal_lm"), rows_of("causal_lm")
    assert network.layout.looks_at == "targets"
    whole = without(network)
    del model.model.decoder.layers[-1]  # as on a step that leaves it out
    found, expected = (n.supervised_hidden(collate(rows, 0, n.layout)) for n in (network, whole))
    assert torch.equal(found, expected)


class Mixing(nn.Module):
    """What a token becomes depends on its neighbours."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden + torch.roll(hidden, 1, 1))


def test_a_layer_that_mixes_tokens_behind_attention_runs_on_all_of_them():
    model: Any = adapted("llama", "causal_lm", CAUSAL["llama"][0])
    layer: Any = last_layer(model)
    layer.mlp = Mixing(layer.mlp)
    network = build_network(model, "causal_lm")
    assert network.layout.looks_at is None
    assert "forward" not in vars(layer), "its own code is back"


def test_a_layer_is_as_before_when_it_is_lengthened():
    layer = last_layer(adapted("llama", "causal_lm", CAUSAL["llama"][0]))
    assert layer is not None
    own = layer.forward
    shorten(layer)
    assert layer.forward != own
    lengthen(layer)
    assert layer.forward == own
