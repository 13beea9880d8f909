"""DoRA (arXiv:2402.09353) against dense arithmetic in float64, and against PEFT."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.adapter import tensors_of
from lora_cli.adapters.files import load_trained
from lora_cli.adapters.injection import adapters_of
from lora_cli.adapters.layer import LoRALinear, Parametrisation, fold
from lora_cli.commands.fitted import attach_fitted, fit_adapter
from lora_cli.models import load_model
from lora_cli.ops.dropout import dropout
from lora_cli.ops.row_norms import adapted_row_norms, row_squares
from tests.made import IDS, base_model, peft_adapter

IN, OUT, R, N = 12, 7, 3, 20
SCALING = 0.7


def layer_of(base: nn.Module, dtype: torch.dtype = torch.float32, dropout: float = 0.0, start: bool = False):
    """A layer whose A, B and magnitudes all hold values of their own."""
    layer = LoRALinear(base.to(dtype).requires_grad_(False), R, SCALING, Parametrisation(dropout, True, start))
    with torch.no_grad():
        layer.begin(torch.randn(R, IN), torch.randn(OUT, R))
        for parameter in layer.parameters(recurse=False):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def bases() -> list[nn.Module]:
    torch.manual_seed(0)
    conv = Conv1D(OUT, IN)
    nn.init.normal_(conv.weight)
    nn.init.normal_(conv.bias)
    return [nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False), conv]


def dense(layer: LoRALinear, x: Tensor, *, detached: bool = True) -> Tensor:
    """m (W + s B A) x / ||W + s B A|| + b in float64, as the paper writes it."""
    weight = layer.base.weight.double()
    a, b = (t.double() for t in layer.factors())
    whole = (weight.T if isinstance(layer.base, Conv1D) else weight) + layer.scaling * b @ a
    norms = whole.norm(dim=1, keepdim=True)
    directed = layer.lora_magnitude_vector.double()[:, None] * whole / (norms.detach() if detached else norms)
    return x.double() @ directed.T + (0 if layer.base.bias is None else layer.base.bias.double())


@pytest.mark.parametrize("number", range(3), ids=["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("start", [False, True])
def test_forward_and_every_gradient_are_the_dense_formula_s(number: int, start: bool):
    layer = layer_of(bases()[number], start=start)
    x = torch.randn(N, IN, requires_grad=True)
    weights = torch.randn(N, OUT)
    (layer(x) * weights).sum().backward()
    ours = {name: p.grad.clone() for name, p in [*layer.named_parameters(recurse=False), ("x", x)]}
    for parameter in (*layer.parameters(recurse=False), x):
        parameter.grad = None
    expected = dense(layer, x)
    assert (layer(x).double() - expected).norm() < 1e-6 * expected.norm()
    (expected * weights).sum().backward()
    for name, parameter in [*layer.named_parameters(recurse=False), ("x", x)]:
        assert (ours[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


def test_the_norm_has_no_gradient():
    """The control of the test above: with a gradient through the norm, A's is another one."""
    layer, x = layer_of(bases()[0]), torch.randn(N, IN)
    found = [torch.autograd.grad(dense(layer, x, detached=d).square().sum(), layer.lora_A)[0] for d in (True, False)]
    assert (found[0] - found[1]).norm() > 0.05 * found[0].norm()


def test_it_begins_as_the_base_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        for base in bases():
            layer = LoRALinear(base.to(dtype).requires_grad_(False), R, SCALING, Parametrisation(use_dora=True))
            with torch.no_grad():
                layer.begin(torch.randn(R, IN), torch.zeros(OUT, R))
            x = torch.randn(N, IN).to(dtype)
            assert torch.equal(layer(x), base(x))


def test_bfloat16_follows_a_float32_reference():
    layer = layer_of(bases()[0], torch.bfloat16)
    x = torch.randn(N, IN).bfloat16().requires_grad_()
    layer(x).float().square().sum().backward()
    ours = layer.lora_magnitude_vector.grad.clone()
    layer.lora_magnitude_vector.grad = None
    expected = dense(layer, x)
    assert (layer(x).double() - expected).norm() < 1e-2 * expected.norm()
    expected.square().sum().backward()
    assert (ours - layer.lora_magnitude_vector.grad).norm() < 3e-2 * ours.norm()
    assert ours.dtype == torch.float32


def test_dropout_falls_on_the_input_of_a_alone():
    layer, x = layer_of(bases()[0], dropout=0.4).train(), torch.randn(N, IN)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = dropout(x, 0.4)
    update = layer.scaling * dropped @ layer.lora_A.T @ layer.lora_B.T
    expected = layer.gain() * (x @ layer.base.weight.T + update) + layer.base.bias
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, layer.eval()(x), atol=1e-2)


def test_row_norms_are_those_of_the_matrix_that_is_never_formed():
    weight, a, b = torch.randn(OUT, IN), torch.randn(R, IN), torch.randn(OUT, R)
    whole = weight.double() + SCALING * b.double() @ a.double()
    found = adapted_row_norms(weight, row_squares(weight), a, b, SCALING)
    assert torch.allclose(found.double(), whole.norm(dim=1), rtol=1e-6)
    none = adapted_row_norms(weight, row_squares(weight), a, torch.zeros(OUT, R), SCALING)
    assert torch.equal(none, row_squares(weight).sqrt())


def test_a_row_of_zeros_stays_one_and_makes_nothing_that_is_not_finite():
    base = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    base.weight[2] = 0
    layer = LoRALinear(base, R, SCALING, Parametrisation(use_dora=True))
    with torch.no_grad():
        layer.begin(torch.randn(R, IN), torch.zeros(OUT, R))
    x = torch.randn(N, IN)
    layer(x).sum().backward()
    assert not layer(x)[:, 2].any()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("number", [0, 2], ids=["linear", "conv1d"])
def test_fold_is_the_layer_as_one_matrix(number: int):
    layer, x = layer_of(bases()[number]), torch.randn(N, IN)
    transposed = isinstance(layer.base, Conv1D)
    folded = fold(layer.base.weight, *layer.factors(), SCALING, transposed, layer.lora_magnitude_vector)
    weight_OI = folded.T if transposed else folded
    expected = layer(x) - layer.base.bias
    assert (x @ weight_OI.T - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_gradient_is_peft_s(kind: str, tmp_path, model_folder):
    base = model_folder(kind)
    theirs = peft_adapter(
        base, tmp_path / "adapter", "causal_lm", use_dora=True, **({"fan_in_fan_out": True} if kind == "gpt2" else {})
    ).train()
    fitted = fit_adapter(tmp_path / "adapter")
    ours, _ = load_model(fitted.base, fitted.config, "causal_lm", torch.float32)
    attach_fitted(ours, fitted)
    load_trained(ours, tensors_of(fitted.adapter))
    for model in (ours.train(), theirs):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = gradients_of(theirs)
    assert len(gradients) == 3 * len(adapters_of(ours))
    for name, layer in adapters_of(ours).items():
        for part, parameter in layer.trained().items():
            expected = gradients[f"{name}.{part}"]
            assert (parameter.grad - expected).norm() < 1e-5 * expected.norm() + 1e-9, (name, part)


def gradients_of(model: peft.PeftModel) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
            found[own] = parameter.grad
    return found


def test_the_update_is_seen(tmp_path, model_folder):
    """DoRA and LoRA of the same A and B give other logits."""
    model = peft_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm", use_dora=True)
    plain = base_model(model_folder("llama"), "causal_lm")
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - plain(input_ids=IDS).logits).abs().max() > 1e-2


def test_norms_over_a_start_do_not_suffer_from_bfloat16():
    """The update is a small difference of large products, which bfloat16 products would blur."""
    torch.manual_seed(0)
    base = nn.Linear(256, 256, bias=False).bfloat16().requires_grad_(False)
    layer = LoRALinear(base, 16, 1.0, Parametrisation(use_dora=True, has_start=True))
    u, s, vh = torch.linalg.svd(base.weight.float())
    with torch.no_grad():
        layer.begin(s[:16, None].sqrt() * vh[:16], u[:, :16] * s[:16].sqrt())
        for factor in (layer.lora_A, layer.lora_B):
            factor.add_(1e-3 * torch.randn_like(factor))
    a, b = (t.detach().double() for t in layer.factors())
    expected = (base.weight.double() + b @ a).norm(dim=1)
    found = layer.lora_magnitude_vector.detach().double() / layer.gain().detach().double()
    assert (found / expected - 1).abs().max() < 1e-5
