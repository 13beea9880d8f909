"""The layer against dense arithmetic: y = W x + b + s B A drop(x)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.layer import LoRALinear, Parametrisation, features, fold, scaling_of
from lora_cli.ops.dropout import dropout

IN, OUT, R = 12, 7, 3
KINDS = ["linear", "conv1d"]


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> nn.Linear | Conv1D:
    torch.manual_seed(0)
    base = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT)
    nn.init.normal_(base.weight)
    nn.init.normal_(base.bias)
    return base.to(dtype)


def layer_of(kind: str, *, scaling: float = 0.7, dropout: float = 0.0, dtype: torch.dtype = torch.float32):
    """A layer whose A and B both hold values."""
    layer = LoRALinear(base_of(kind, dtype), R, scaling, Parametrisation(dropout))
    layer.base.requires_grad_(False)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    return layer


def dense_weight(layer: LoRALinear) -> torch.Tensor:
    """W + s B A in float64, (O, I)."""
    weight = layer.base.weight.double()
    weight_OI = weight.T if isinstance(layer.base, Conv1D) else weight
    return weight_OI + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 5, IN)])
def test_output_is_that_of_the_dense_weight(kind, shape):
    layer, x = layer_of(kind), torch.randn(shape)
    expected = x.double() @ dense_weight(layer).T + layer.base.bias.double()
    assert ((layer(x).double() - expected).abs() / expected.abs().clamp(min=1)).max() < 1e-6
    assert (layer(x) - layer.base(x)).abs().max() > 0.1  # the control: the update does something


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_b_zero_the_output_is_the_bases_bit_for_bit(kind, dtype):
    layer, x = layer_of(kind, dtype=dtype), torch.randn(9, IN).to(dtype)
    assert not torch.equal(layer(x), layer.base(x))
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer(x), layer.base(x))
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_closed_form(kind):
    """With G the gradient of y: dA = s Bᵀ Gᵀ x, dB = s Gᵀ x Aᵀ, dx = G (W + s B A)."""
    layer = layer_of(kind)
    x = torch.randn(6, IN, requires_grad=True)
    gradient = torch.randn(6, OUT)
    layer(x).backward(gradient)
    G, X, A, B = (t.detach().double() for t in (gradient, x, layer.lora_A, layer.lora_B))
    s = layer.scaling
    for found, expected in [
        (layer.lora_A.grad, s * B.T @ G.T @ X),
        (layer.lora_B.grad, s * G.T @ X @ A.T),
        (x.grad, G @ dense_weight(layer).detach()),
    ]:
        assert (found.double() - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_weight_gets_no_gradient_buffer(kind):
    layer = layer_of(kind)
    layer(torch.randn(4, IN)).sum().backward()
    assert layer.base.weight.grad is None
    assert layer.base.bias.grad is None
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["lora_A", "lora_B"]


def test_a_layer_without_bias_adds_none():
    layer = LoRALinear(nn.Linear(IN, OUT, bias=False), R, 1.0)
    assert layer.bias is None
    assert torch.equal(layer(torch.zeros(2, IN)), torch.zeros(2, OUT))


def test_dropout_falls_on_the_input_of_a_alone():
    layer, x = layer_of("linear", dropout=0.4), torch.randn(200, IN)
    layer.train()
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = dropout(x, 0.4)
    expected = layer.base(x) + layer.scaling * dropped @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(y, expected, rtol=1e-6, atol=1e-5)
    share = float((dropped == 0).float().mean())
    assert abs(share - 0.4) < 0.05
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer(x), layer.base(x))  # the base's own path is never dropped


def test_dropout_is_off_in_evaluation():
    layer, x = layer_of("linear", dropout=0.4).eval(), torch.randn(5, IN)
    expected = layer.base(x) + layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x), expected, rtol=1e-6, atol=1e-5)


def test_dropout_zero_draws_no_random_number():
    layer = layer_of("linear").train()
    before = torch.get_rng_state()
    layer(torch.ones(5, IN))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("alpha", "r", "rslora", "scale"),
    [(32, 16, False, 2.0), (16, 64, False, 0.25), (16, 64, True, 2.0), (16, 1, True, 16.0), (3.5, 7, False, 0.5)],
)
def test_scale_is_alpha_over_r_or_over_its_root(alpha, r, rslora, scale):
    assert scaling_of(alpha, r, rslora) == scale
    assert rslora is False or scale == alpha / math.sqrt(r)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_float32_over_a_bfloat16_base_and_stay_so(kind):
    layer = layer_of(kind, dtype=torch.bfloat16)
    layer(torch.randn(4, IN).bfloat16()).float().sum().backward()
    assert layer.base.weight.dtype == torch.bfloat16
    for parameter in (layer.lora_A, layer.lora_B):
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_products_over_a_bfloat16_base_run_in_bfloat16_and_are_as_exact_as_the_plain_formula():
    layer, x = layer_of("linear", dtype=torch.bfloat16), torch.randn(512, IN).bfloat16()
    plain = layer.base(x) + layer.scaling * (x @ layer.lora_A.bfloat16().T @ layer.lora_B.bfloat16().T)
    update = layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    exact = x.double() @ (layer.base.weight.double() + update).T + layer.base.bias.double()
    ours = layer(x)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).norm() <= 1.05 * (plain.double() - exact).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_peft_s_whatever_the_base_stores(kind):
    layer = layer_of(kind)
    assert features(layer.base) == (IN, OUT)
    assert layer.lora_A.shape == (R, IN)
    assert layer.lora_B.shape == (OUT, R)
    assert layer.r == R


def test_model_code_that_looks_at_the_weight_finds_the_bases():
    layer = layer_of("linear")
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fold_is_w_plus_s_b_a_in_float32(kind, dtype):
    layer, x = layer_of(kind, dtype=dtype), torch.randn(5, IN)
    folded = fold(layer.base.weight, layer.lora_A, layer.lora_B, layer.scaling, kind == "conv1d")
    assert folded.dtype == torch.float32
    expected = dense_weight(layer)
    assert ((folded.T if kind == "conv1d" else folded).double() - expected).abs().max() < 1e-6 * expected.abs().max()
    if dtype == torch.float32:
        merged = base_of(kind)
        merged.weight.data = folded.detach()
        assert torch.allclose(merged(x), layer(x), rtol=1e-6, atol=1e-5)
        assert not torch.allclose(layer.base(x), layer(x), atol=0.1)


def test_fold_rounds_nothing_before_the_caller_does():
    """An update far below bfloat16's resolution of W survives in float32."""
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    update = torch.full((1, 1), 2.0**-12)
    folded = fold(weight, update, torch.ones(1, 1), 1.0, transposed=False)
    assert float(folded) == 1 + 2.0**-12
