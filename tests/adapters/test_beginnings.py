"""Beginnings away from zero, and those measured on rows: against their papers' formulas, and against PEFT."""

from __future__ import annotations

from collections.abc import Iterator

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_cli.adapters.initialisation import initialise
from lora_cli.adapters.injection import adapters_of, attach, freeze_base, parametrisation
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.measured import _scaled_directions, redistribute
from lora_cli.adapters.targets import find_targets
from lora_cli.errors import DataError
from lora_cli.recipe import LoraSection
from tests.conftest import tiny_model
from tests.made import IDS, logits

KINDS = ["orthogonal", "pissa", "pissa_niter_16", "olora"]
MEASURED = ["eva", "lora_ga"]


class SomeRows:
    """The two rows of ``IDS``; the loss is that of the next token, summed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run(self, count: int) -> Iterator[None]:
        for row in IDS[:count]:
            self.model(input_ids=row[None])
            yield

    def run_back(self, count: int) -> Iterator[int]:
        for row in IDS[:count]:
            with torch.enable_grad():
                loss = self.model(input_ids=row[None], labels=row[None]).loss * (len(row) - 1)
            loss.backward()
            yield len(row) - 1


def begun(kind: str, **lora: object) -> nn.Module:
    model = tiny_model("llama")
    section = LoraSection(**{"r": 4, "lora_alpha": 6.0, "init_lora_weights": kind} | lora)
    attach(model, find_targets(model, section, []), parametrisation(section))
    freeze_base(model, [])
    initialise(adapters_of(model), section, 0, SomeRows(model))
    return model


@pytest.mark.parametrize("kind", [*KINDS, *MEASURED])
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_adapted_model_begins_as_the_base(kind: str, use_dora: bool):
    model = begun(kind, use_dora=use_dora)
    base = logits(tiny_model("llama"))
    assert (logits(model) - base).abs().max() < 1e-5
    with torch.no_grad():
        for layer in adapters_of(model).values():
            layer.lora_B.add_(0.1)
    assert (logits(model) - base).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_and_b_are_peft_s(kind: str):
    layers = adapters_of(begun(kind))
    theirs = peft.get_peft_model(
        tiny_model("llama"),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=kind, task_type="CAUSAL_LM"),
    )
    for name, layer in layers.items():
        other = theirs.base_model.model.get_submodule(name)
        for part in ("lora_A", "lora_B"):
            expected = getattr(other, part)["default"].weight
            assert (getattr(layer, part) - expected).norm() < 1e-4 * expected.norm(), (name, part)
    assert (logits(theirs) - logits(tiny_model("llama"))).abs().max() < 1e-5


def shares_left(kind: str) -> list[float]:
    """||W - s B A|| of each layer, as a multiple of the least that rank 4 can leave (Eckart-Young)."""
    shares = []
    with torch.no_grad():
        for layer in adapters_of(begun(kind)).values():
            weight = layer.base.weight.double()
            left = weight - layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
            shares.append(float(left.norm() / torch.linalg.svdvals(weight)[4:].norm()))
    return shares


def test_pissa_is_the_best_approximation_of_its_rank():
    assert max(shares_left("pissa")) < 1 + 1e-6
    assert min(shares_left("olora")) > 1.01  # the control


def test_fast_pissa_nears_it_with_more_iterations():
    """The worst case: these weights are noise, whose singular values fall slowly."""
    assert max(shares_left("pissa_niter_16")) < 1.01
    assert max(shares_left("pissa_niter_16")) < max(shares_left("pissa_niter_1"))


def test_orthogonal_has_a_and_b_and_no_product():
    for layer in adapters_of(begun("orthogonal")).values():
        assert layer.lora_A.norm() > 0.1
        assert layer.lora_B.norm() > 0.1
        assert (layer.lora_B @ layer.lora_A).norm() < 1e-6 * layer.lora_A.norm() * layer.lora_B.norm()


@pytest.mark.parametrize("kind", [*KINDS, *MEASURED])
def test_another_beginning_is_another_one(kind: str):
    ours, plain = adapters_of(begun(kind)), adapters_of(begun(True))
    assert all(layer.r != plain[n].r or not torch.equal(layer.lora_A, plain[n].lora_A) for n, layer in ours.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_whole_update_and_gives_it_back(kind: str):
    """s (B A - B_0 A_0) = s [B, -B_0] [A; A_0], a plain adapter of twice the rank; loading splits it again."""
    for layer in adapters_of(begun(kind)).values():
        with torch.no_grad():
            layer.lora_A.add_(0.1)
        saved = {part: tensor.clone() for part, tensor in layer.trained().items()}
        assert saved["lora_A"].shape[0] == layer.file_rank == (4 if kind == "orthogonal" else 8)
        other = LoRALinear(layer.base, 4, layer.scaling, parametrisation(LoraSection(init_lora_weights=kind)))
        other.load(saved)
        assert all(torch.equal(tensor, saved[part]) for part, tensor in other.trained().items())
        x = torch.randn(3, layer.lora_A.shape[1])
        assert torch.equal(other(x), layer(x))


def inputs_of(name: str) -> Tensor:
    """What enters a layer over both rows, (N, I) float64."""
    model, seen = tiny_model("llama"), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()[0]))
    for row in IDS:
        model(input_ids=row[None])
    return torch.cat(seen).double()


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_eva_finds_the_principal_directions_of_the_inputs(name: str):
    """A's rows are the first right singular vectors of all inputs together, up to sign; B is zero."""
    layer = adapters_of(begun("eva", eva_config={"rho": 1.0, "tau": 1.0}))[name]
    expected = torch.linalg.svd(inputs_of(name), full_matrices=False).Vh[:4]
    likeness = (layer.lora_A.double() * expected).sum(1).abs()
    assert likeness.min() > 0.99
    assert not layer.lora_B.any()


def test_eva_hands_out_the_ranks_that_the_recipe_has():
    layers = adapters_of(begun("eva", eva_config={"rho": 2.0}))
    ranks = [layer.r for layer in layers.values()]
    assert sum(ranks) == 4 * len(layers)
    assert min(ranks) >= 1
    assert max(ranks) <= 8
    assert len(set(ranks)) > 1
    assert {layer.scaling for layer in layers.values()} == {6.0 / 4}  # whatever the rank


def test_redistribution_takes_the_best_directions_of_all():
    explained = {"a": [0.9, 0.05, 0.03, 0.01], "b": [0.3, 0.25, 0.2, 0.1]}
    assert redistribute(explained, {"a": 2, "b": 2}, 2.0) == {"a": 1, "b": 3}
    assert redistribute(explained, {"a": 2, "b": 2}, 1.0) == {"a": 2, "b": 2}
    assert redistribute(explained, {"a": 2, "b": 2}, 1.5) == {"a": 1, "b": 3}


def test_too_few_directions_are_a_data_error():
    with pytest.raises(DataError, match="eva finds 1 directions in what enters a, and needs 2"):
        redistribute({"a": [1.0]}, {"a": 2}, 1.0)


def test_too_few_directions_for_all_ranks_are_a_data_error():
    with pytest.raises(DataError, match="eva finds 3 directions in all inputs, and the ranks add up to 4"):
        redistribute({"a": [0.9, 0.1], "b": [1.0]}, {"a": 2, "b": 2}, 2.0)


@pytest.mark.parametrize("rows", [6, 40], ids=["fewer rows than features", "more"])
def test_directions_are_those_of_an_svd_and_no_more_than_there_are(rows):
    """Rows that repeat bring noise, and no direction."""
    torch.manual_seed(0)
    distinct = torch.randn(5, 16)
    x_MI = distinct[torch.arange(rows) % 5]
    found = _scaled_directions(x_MI)
    _, s, vh = torch.linalg.svd(x_MI.double(), full_matrices=False)
    assert len(found) == 5
    assert torch.allclose(found.norm(dim=1).double(), s[:5], rtol=1e-4)
    likeness = (found.double() * vh[:5]).sum(1).abs() / s[:5]
    assert likeness.min() > 0.999


def gradient_of(name: str) -> Tensor:
    model = tiny_model("llama")
    targets = 0
    for row in IDS:
        (model(input_ids=row[None], labels=row[None]).loss * (len(row) - 1)).backward()
        targets += len(row) - 1
    return model.get_submodule(name).weight.grad.double() / targets


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"])
def test_lora_ga_splits_the_gradient_s_singular_vectors(name: str):
    layer = adapters_of(begun("lora_ga"))[name]
    u, s, vh = torch.linalg.svd(gradient_of(name), full_matrices=False)
    out_features = layer.lora_B.shape[0]
    expected_B = u[:, 4:8] * s[4:8] * out_features**0.25 / 4
    a, b = layer.lora_A.double(), layer.lora_B.double()
    assert ((a * vh[:4]).sum(1).abs() > 0.999).all()
    likeness = (b * expected_B).sum(0).abs() / (b.norm(dim=0) * expected_B.norm(dim=0))
    assert (likeness > 0.99).all()
    assert torch.allclose(b.norm(dim=0), expected_B.norm(dim=0), rtol=1e-3)


def test_lora_ga_takes_gradients_in_parts_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch):
    whole = {name: layer.lora_B.clone() for name, layer in adapters_of(begun("lora_ga")).items()}
    monkeypatch.setattr("lora_cli.adapters.measured.GRADIENT_BYTES", 3 * 4 * 32 * 32)
    for name, layer in adapters_of(begun("lora_ga")).items():
        assert torch.allclose(layer.lora_B, whole[name], atol=1e-6)


def test_measuring_leaves_no_hooks():
    for kind in MEASURED:
        model = begun(kind)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
