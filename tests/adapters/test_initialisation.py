"""How A and B begin: PEFT's distributions, one stream for each module."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import Tensor, nn

from lora_cli.adapters.initialisation import INITIALISATIONS, gaussian, initialise, kaiming_uniform
from lora_cli.adapters.injection import adapters_of, attach, freeze_base
from lora_cli.adapters.layer import LoRALinear
from lora_cli.adapters.targets import find_targets
from lora_cli.recipe import LoraSection
from lora_cli.seeds import stream
from tests.conftest import tiny_model

R, IN = 64, 512  # 32,768 values: moments are known to about 1 %
KINDS = [True, "gaussian"]


def square_layer() -> LoRALinear:
    return LoRALinear(nn.Linear(IN, IN), R, 1.0)


def drawn(kind: bool | str, seed: int = 0) -> Tensor:
    return INITIALISATIONS[str(kind).lower()].begin(square_layer(), stream(seed, "init", "x"))[0]


def by_peft(kind: bool | str) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN))
    config = peft.LoraConfig(r=R, target_modules=["0"], init_lora_weights=kind)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    assert not layer.lora_B["default"].weight.any()
    return layer.lora_A["default"].weight.detach()


def test_kaiming_fills_its_bounds_and_no_more():
    values, bound = drawn(True), 1 / math.sqrt(IN)
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.999 * bound
    assert abs(float(values.mean())) < 0.02 * bound
    assert float(values.var()) == pytest.approx(1 / (3 * IN), rel=0.02)  # of U(-b, b): b^2 / 3


def test_gaussian_has_deviation_one_over_r():
    values = drawn("gaussian")
    assert float(values.std()) == pytest.approx(1 / R, rel=0.02)
    assert abs(float(values.mean())) < 0.02 / R
    assert float((values.abs() > 1 / R).float().mean()) == pytest.approx(0.3173, abs=0.01)  # beyond one deviation


def largest_cdf_difference(ours: Tensor, theirs: Tensor) -> float:
    """The Kolmogorov-Smirnov statistic of two samples."""
    at = torch.cat([ours.flatten(), theirs.flatten()]).sort().values
    cdfs = [torch.searchsorted(t.flatten().sort().values, at, right=True) / t.numel() for t in (ours, theirs)]
    return float((cdfs[0] - cdfs[1]).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_distribution_is_peft_s(kind):
    """Two samples of one distribution stay below 1.63 sqrt(2 / n) in 99 of 100 draws; another one's does not."""
    limit = 1.63 * math.sqrt(2 / (R * IN))
    assert largest_cdf_difference(drawn(kind), by_peft(kind)) < limit
    assert largest_cdf_difference(drawn("gaussian" if kind is True else True), by_peft(kind)) > 5 * limit


def layers(targets: list[str], *, kind: bool | str = True, seed: int = 42) -> dict[str, LoRALinear]:
    model = tiny_model("llama")
    attach(model, find_targets(model, LoraSection(r=4, target_modules=targets), []))
    freeze_base(model, [])
    found = adapters_of(model)
    with torch.no_grad():
        for layer in found.values():
            layer.lora_B.fill_(9.0)
    initialise(found, LoraSection(init_lora_weights=kind), seed)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_adding_a_target_changes_no_other_a(kind):
    alone, both = layers(["q_proj"], kind=kind), layers(["k_proj", "q_proj", "up_proj"], kind=kind)
    assert len(alone) == 2
    assert len(both) == 6
    for name, layer in alone.items():
        assert torch.equal(layer.lora_A, both[name].lora_A)


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_modules_and_no_two_seeds_begin_alike(kind):
    found, other = layers(["q_proj", "o_proj"], kind=kind), layers(["q_proj", "o_proj"], kind=kind, seed=43)
    first_values = [float(layer.lora_A.detach()[0, 0]) for group in (found, other) for layer in group.values()]
    assert len(set(first_values)) == 8
    again = layers(["q_proj", "o_proj"], kind=kind)
    assert all(torch.equal(layer.lora_A, again[name].lora_A) for name, layer in found.items())


def test_b_begins_at_zero_and_a_does_not():
    for layer in layers(["q_proj"]).values():
        assert not layer.lora_B.any()
        assert layer.lora_A.abs().min() > 0
        assert layer.lora_A.requires_grad
        assert layer.lora_B.requires_grad


def test_initialising_draws_nothing_from_the_global_stream():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    found = {"a": LoRALinear(nn.Linear(4, 4, device="meta"), 2, 1.0)}
    found["a"].to_empty(device="cpu")
    initialise(found, LoraSection(), seed=0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("draw", [kaiming_uniform, gaussian])
def test_values_depend_on_the_generator_alone(draw):
    layer = square_layer()
    assert torch.equal(draw(layer, stream(7))[0], draw(layer, stream(7))[0])
    assert not torch.equal(draw(layer, stream(7))[0], draw(layer, stream(8))[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapted_model_begins_as_the_base_bit_for_bit(kind, dtype):
    task = "causal_lm" if kind in ("llama", "gpt2") else "sequence_classification"
    model = tiny_model(kind, task).to(dtype)
    ids = torch.randint(3, 300, (2, 9), generator=stream(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        saved = [] if task == "causal_lm" else ["classifier"]
        attach(model, find_targets(model, LoraSection(r=4), saved))
        initialise(adapters_of(model), LoraSection(), seed=0)
        assert torch.equal(model(input_ids=ids).logits, before)
        for layer in adapters_of(model).values():
            layer.lora_B.fill_(0.1)
        assert (model(input_ids=ids).logits - before).abs().max() > 1e-2
