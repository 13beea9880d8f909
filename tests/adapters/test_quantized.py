"""A packed linear layer: dense arithmetic with the unpacked weight, forward and backward, alone and adapted."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.initialisation import INITIALISATIONS, kind_of
from lora_cli.adapters.injection import packable_modules, quantize
from lora_cli.adapters.layer import (
    LoRALinear,
    Parametrisation,
    features,
    frozen_projection,
    is_transposed,
    projection_of,
    weight_of,
)
from lora_cli.adapters.quantized import Quantization, QuantizedLinear, quantized
from lora_cli.adapters.targets import linear_modules
from lora_cli.ops.gated import gated_low_rank
from lora_cli.ops.low_rank import dense
from lora_cli.ops.packing import pack, unpack
from lora_cli.recipe.rules.facts import STARTS_FROM_WEIGHTS
from lora_cli.seeds import stream
from tests.conftest import tiny_model

KINDS = ["nf4", "int8"]
IN, OUT = 80, 48


def layer(cls=nn.Linear, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Linear(IN, OUT, bias=bias) if cls is nn.Linear else Conv1D(OUT, IN)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made.to(dtype).requires_grad_(False)


def unpacked(packed: QuantizedLinear) -> torch.Tensor:
    return dense(*weight_of(packed), torch.float32)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    chance = stream(1, "quantized")
    x, dy = torch.randn(3, 5, IN, generator=chance), torch.randn(3, 5, OUT, generator=chance)
    return x.to(dtype).requires_grad_(True), dy.to(dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_forward_and_gradient_are_those_of_the_unpacked_weight(cls, kind, dtype, tolerance):
    base = layer(cls, dtype)
    weight_OI = base.weight.float().T if cls is Conv1D else base.weight.float()
    packed = quantized(base, kind)
    x, dy = inputs(dtype)
    y = packed(x)
    y.backward(dy)
    seen = unpacked(packed)
    reference = x.detach().float().requires_grad_(True)
    expected = F.linear(reference, seen, base.bias.float())
    expected.backward(dy.float())
    assert y.dtype == x.grad.dtype == dtype
    assert relative(y, expected) < tolerance
    assert relative(x.grad, reference.grad) < tolerance
    assert relative(seen, weight_OI) > 1e-3, "packing changes the weight: else nothing is shown"
    assert features(packed) == (IN, OUT)
    assert is_transposed(packed) == is_transposed(base) == (cls is Conv1D)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapted_layer_is_that_of_a_dense_layer_with_the_unpacked_weight(kind, dropout, use_dora):
    """Through the fused arithmetic; with dropout of the same draw, and with DoRA's norms, too."""
    form = Parametrisation(dropout=dropout, use_dora=use_dora)
    packed = quantized(layer(), kind)
    twin = layer()
    twin.weight.copy_(unpacked(packed))
    found, expected = LoRALinear(packed, 4, 0.5, form), LoRALinear(twin, 4, 0.5, form)
    results = []
    for adapted in (found, expected):
        chance = stream(2, "adapter")
        adapted.begin(torch.randn(4, IN, generator=chance), torch.randn(OUT, 4, generator=chance))
        x, dy = inputs()
        torch.manual_seed(3)
        y = adapted(x)
        y.backward(dy)
        trained = [p.grad for p in adapted.parameters() if p.requires_grad and p.grad is not None]
        results.append([y, x.grad, *trained])
    assert len(results[0]) == len(results[1]) == (5 if use_dora else 4)
    for one, other in zip(*results, strict=True):
        assert relative(one, other) < 1e-6
    assert projection_of(found) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_projection_behind_a_gate(kind):
    down = quantized(layer(), kind)
    grads = []
    for projection in (frozen_projection(down), None):
        gate, up = (torch.randn(6, IN, generator=stream(5, name)).requires_grad_(True) for name in ("gate", "up"))
        if projection is not None:
            y = gated_low_rank(gate, up, "silu", projection)
        else:
            y = F.linear(F.silu(gate) * up, unpacked(down), down.bias)
        y.backward(torch.ones_like(y))
        grads.append((y, gate.grad, up.grad))
    for one, other in zip(*grads, strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_training_evaluation_and_training_again_is_training_alone(kind, dtype):
    """bitsandbytes' own 4-bit layer repacks its weight in an evaluation on some CPUs, and then gives no gradient."""

    def gradient(*, evaluate: bool) -> tuple[torch.Tensor, torch.Tensor]:
        packed = quantized(layer(dtype=dtype), kind)
        x, dy = inputs(dtype)
        packed.train()(x).backward(dy)
        if evaluate:
            with torch.no_grad():
                packed.eval()(x)
        x.grad = None
        packed.train()(x).backward(dy)
        assert x.grad is not None
        return x.grad, packed.weight

    for one, other in zip(gradient(evaluate=True), gradient(evaluate=False), strict=True):
        assert torch.equal(one, other)
    assert gradient(evaluate=True)[0].abs().max() > 1


def linear_bytes(model: nn.Module, names: list[str]) -> int:
    """Of what is stored of these layers' weights: tensors, not timing."""
    modules = [model.get_submodule(name) for name in names]
    return sum(module.weight.nbytes + sum(buffer.nbytes for buffer in module.buffers()) for module in modules)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.30), ("int8", 0.57)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta"])
def test_linear_layers_take_at_most_this_share_of_bfloat16(name, kind, most):
    model = tiny_model(name).to(torch.bfloat16)
    names = list(linear_modules(model))
    before = linear_bytes(model, names)
    quantize(model, packable_modules(model, []), kind)
    assert linear_bytes(model, names) <= most * before
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in names)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_on_meta_the_bytes_are_the_same(name):
    real, outlined = tiny_model(name), tiny_model(name).to("meta")
    for model in (real, outlined):
        quantize(model, packable_modules(model, []), "nf4")
    names = list(linear_modules(real))
    assert names
    assert linear_bytes(outlined, names) == linear_bytes(real, names)


def test_heads_saved_modules_and_shared_weights_stay_dense():
    model = tiny_model("llama")
    inside = packable_modules(model, ["model.layers.0.mlp"])
    assert "model.layers.0.self_attn.q_proj" in inside
    assert "model.layers.0.mlp.up_proj" not in inside
    assert "lm_head" not in inside
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[1].mlp.gate_proj.weight
    assert not {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"} & set(packable_modules(model, []))


def test_a_subclass_of_a_linear_layer_stays_as_it_is():
    """Its call may be more than a product."""

    class Clipped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1, 1)

    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = Clipped(32, 48, bias=False)
    assert "model.layers.0.mlp.up_proj" not in packable_modules(model, [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [nn.Linear, Conv1D])
def test_what_a_merge_sees_is_what_the_layer_computes_with(kind, cls):
    """Made from the float32 file of a run in bfloat16."""
    base = layer(cls)
    packed = quantized(layer(cls).to(torch.bfloat16), kind)
    seen = Quantization(kind, torch.bfloat16, frozenset()).seen(base.weight, cls is Conv1D)
    assert seen.shape == base.weight.shape
    assert torch.equal((seen.T if cls is Conv1D else seen).float(), unpacked(packed))


def test_rounding_to_the_wider_type_first_is_not_the_same():
    base = layer()
    narrow = Quantization("nf4", torch.bfloat16, frozenset()).seen(base.weight, False).float()
    wide = unpack(pack(base.weight, "nf4"), "nf4", (OUT, IN), torch.float32)
    assert 0 < relative(narrow, wide) < 0.05


def test_the_rule_names_the_initialisations_that_need_a_dense_base():
    names = [*INITIALISATIONS, "pissa_niter_4"]
    assert {name for name in names if kind_of(name).has_start} == {
        name for name in names if name.startswith(STARTS_FROM_WEIGHTS)
    }
