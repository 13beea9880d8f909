"""Which library multiplies for a model: chosen by its own sizes and type, and the same run either way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lora_cli.adapters.injection import adapters_of
from lora_cli.adapters.quantized import quantized
from lora_cli.data.batches import collate
from lora_cli.fusion.multiplying import choose_products_for, dtype_of
from lora_cli.fusion.outline import outline_network
from lora_cli.fusion.proof import build_network
from lora_cli.models import empty_model
from lora_cli.ops import blocked_attention, products, tiles
from lora_cli.ops.products import onednn_multiplies
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import Sight
from lora_cli.tasks import TASKS
from tests.conftest import tiny_config, tiny_model
from tests.fusion.test_networks import CAUSAL, adapted, loss_and_gradients, rows_of, worst

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def hampered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which oneDNN is faster; and every model is large enough."""
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("with AMX the setting means bfloat16, and is never chosen")
    monkeypatch.setattr(products, "_hampered", lambda: True)
    monkeypatch.setattr(products, "_multiplies_exactly", lambda: True)
    monkeypatch.setattr(products, "LEAST_WEIGHTS", 1)


@pytest.mark.parametrize(
    ("dtype", "onednn", "multiple"),
    [(torch.float32, True, 48), (torch.bfloat16, False, 48), (torch.float64, False, 1)],
)
def test_building_a_network_chooses_and_fills_lines_up_where_kernels_are_made_to_size(dtype, onednn, multiple):
    network = build_network(adapted("llama", "causal_lm", CAUSAL["llama"][0], dtype), "causal_lm")
    assert onednn_multiplies() == onednn
    assert network.layout.multiple == multiple


def test_a_small_model_stays_with_mkl_and_a_plan_on_paper_says_the_same(monkeypatch):
    config = tiny_config("llama")
    for least, onednn in ((10**9, False), (1, True)):
        monkeypatch.setattr(products, "LEAST_WEIGHTS", least)
        found = []
        for build in (
            lambda: build_network(tiny_model("llama"), "causal_lm"),
            lambda: outline_network(empty_model(config, "causal_lm", dtype=torch.float32), "causal_lm", CPU),
        ):
            products.choose_products([], torch.float32, CPU)
            found.append((build().layout, onednn_multiplies()))
        assert found[0] == found[1]
        assert found[0][1] == onednn
        assert found[0][0].multiple == (48 if onednn else 1)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sizes_are_those_of_the_matrices_that_are_multiplied(kind, pack, monkeypatch):
    """GPT-2's lie the other way round; packed ones are unpacked first, and their bytes say nothing."""
    model = adapted(kind, "causal_lm", CAUSAL[kind][0])
    if pack:
        for layer in adapters_of(model).values():
            layer.base = quantized(layer.base, "nf4")
    seen: list[list[int]] = []
    monkeypatch.setattr("lora_cli.fusion.multiplying.choose_products", lambda sizes, *_: seen.append(sorted(sizes)))
    choose_products_for(model, CPU)
    hidden, inner = 32, {"llama": 48, "gpt2": 128}[kind]
    of_layer = {
        "llama": [hidden * hidden] * 2 + [hidden * hidden // 2] * 2 + [hidden * inner] * 3,
        "gpt2": [3 * hidden * hidden, hidden * hidden, hidden * inner, hidden * inner],
    }[kind]
    assert seen == [sorted([*of_layer, *of_layer, 120 * hidden])]


def test_the_type_is_the_base_s_not_that_of_what_is_trained():
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8)).to(torch.bfloat16)
    model[0].lora_embedding_A = nn.Parameter(torch.zeros(2, 4))
    assert dtype_of(model) == torch.bfloat16
    assert dtype_of(nn.LayerNorm(4, dtype=torch.float64)) == torch.float64


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_gradients_are_the_same_whoever_multiplies(kind):
    network, found = build_network(adapted(kind, "causal_lm", CAUSAL[kind][0]), "causal_lm"), []
    for onednn in (True, False):
        products._ask(onednn)
        found.append(loss_and_gradients(network, "causal_lm", rows_of("causal_lm")))
    assert worst(*found) < 1e-5


def test_a_choice_between_forward_and_backward_changes_nothing():
    """The backward pass goes by the tiles of the forward pass."""
    network, found = build_network(adapted("llama", "causal_lm", CAUSAL["llama"][0]), "causal_lm"), []
    for between in (True, False):
        products._ask(True)
        network.model.zero_grad()
        loss = TASKS["causal_lm"].loss_sum(network, collate(rows_of("causal_lm"), 0, network.layout))
        products._ask(between)
        loss.backward()
        found.append([p.grad for p in network.model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_scores_cost_half_and_no_product_is_cut_up_where_onednn_multiplies(monkeypatch):
    prices: list[int] = []
    monkeypatch.setattr(tiles, "_tiling", lambda *given: prices.append(given[5]))
    query = torch.zeros(4, 2, 8)
    cut_up: list[Any] = []
    monkeypatch.setattr(torch, "mm", lambda *args, **out: cut_up.append(args) or torch.matmul(*args, **out))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for onednn in (False, True):
        products._ask(onednn)
        tiles.tiling_of(Rows.of([4]), query, query, Sight(1.0))
        blocked_attention._product(torch.ones(3, 4, 5), torch.ones(3, 5, 6))
        assert len(cut_up) == 1, "MKL's odd one, once"
    assert prices[1] == 2 * prices[0]
