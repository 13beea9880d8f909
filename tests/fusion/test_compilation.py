"""Compiling: element-wise work of fused forms, or whole layers where there are none; and what refuses it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_cli.adapters.injection import adapters_of
from lora_cli.adapters.quantized import quantized
from lora_cli.data.batches import PADDED
from lora_cli.errors import UsageError
from lora_cli.fusion import proof
from lora_cli.fusion.proof import build_compiled_network, build_network
from lora_cli.ops import kernels
from tests.conftest import tiny_model
from tests.fusion.test_networks import CAUSAL, adapted, loss_and_gradients, rows_of, worst


def pretend(monkeypatch: pytest.MonkeyPatch, reason: str | None = None) -> tuple[list[str], list[nn.Module]]:
    """A compiler that notes what it is given and changes nothing."""
    formulas: list[str] = []
    layers: list[nn.Module] = []
    monkeypatch.setattr(proof, "why_not_compiled", lambda device: reason)
    monkeypatch.setattr(kernels, "_compiled", lambda formula: formulas.append(formula.__name__) or formula)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: layers.append(module))
    return formulas, layers


def test_fused_forms_compile_their_element_wise_work_and_nothing_else(monkeypatch):
    formulas, layers = pretend(monkeypatch)
    network = build_compiled_network(adapted("llama", "causal_lm", CAUSAL["llama"][0]), "causal_lm")
    assert network.end_to_end
    loss_and_gradients(network, "causal_lm", rows_of("causal_lm"))
    assert set(formulas) == {"_rms_norm_forward", "_rms_norm_backward", "_rotated", "_inner", "_inner_backward"}
    assert layers == []


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_a_model_without_fused_forms_has_its_layers_compiled_with_rows_side_by_side(kind, monkeypatch):
    formulas, layers = pretend(monkeypatch)
    build = lambda: adapted(kind, "causal_lm", CAUSAL[kind][0])  # noqa: E731
    network, plain = build_compiled_network(build(), "causal_lm"), build_network(build(), "causal_lm")
    assert len(layers) == 2
    assert all("forward" not in vars(layer) for layer in layers), "whole layers, the last one too"
    assert formulas == []
    assert network.layout == PADDED
    assert plain.end_to_end, "without compiling it would not pad"
    assert "rows are padded: layers are compiled" in network.notes
    rows = rows_of("causal_lm")
    ours, other = (loss_and_gradients(n, "causal_lm", rows) for n in (network, plain))
    assert worst(ours, other) < 1e-5


def test_whole_layers_keep_torch_s_own_dropout(monkeypatch):
    pretend(monkeypatch)
    build = lambda: tiny_model("gpt2", resid_pdrop=0.1)  # noqa: E731
    compiled, plain = build_compiled_network(build(), "causal_lm"), build_network(build(), "causal_lm")
    quickened = [[m for m in n.model.modules() if "forward" in vars(m)] for n in (compiled, plain)]
    assert quickened[0] == []
    assert {type(module) for module in quickened[1]} == {nn.Dropout}


def test_whole_layers_of_a_quantized_base_are_not_compiled_and_fused_forms_of_one_are(monkeypatch):
    formulas, layers = pretend(monkeypatch)
    decoder = adapted("gpt2", "causal_lm", CAUSAL["gpt2"][0])
    for layer in adapters_of(decoder).values():
        layer.base = quantized(layer.base, "nf4")
    with pytest.raises(UsageError, match="whole layers that unpack their weights cannot be compiled"):
        build_compiled_network(decoder, "causal_lm")
    assert layers == []
    llama = adapted("llama", "causal_lm", CAUSAL["llama"][0])
    for layer in adapters_of(llama).values():
        layer.base = quantized(layer.base, "nf4")
    network = build_compiled_network(llama, "causal_lm")
    assert set(network.forms) == {"norm", "gated", "attention"}
    loss_and_gradients(network, "causal_lm", rows_of("causal_lm"))
    assert "_inner_backward" in formulas


def test_without_a_compiler_it_is_refused_by_name_and_cuda_s_own_wish_is_only_noted(monkeypatch):
    pretend(monkeypatch, "no C++ compiler")
    model = adapted("llama", "causal_lm", CAUSAL["llama"][0])
    with pytest.raises(UsageError, match="torch_compile cannot work here: no C\\+\\+ compiler"):
        build_compiled_network(model, "causal_lm")
    network = build_network(model, "causal_lm", compile=True)
    assert network.notes == ("element-wise work is not compiled: no C++ compiler",)
    assert network.forms


def test_the_reason_is_the_error_s_first_line(monkeypatch):
    def broken(formula):
        raise RuntimeError("\n  g++ is not there\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    assert kernels.why_not_compiled(torch.device("cpu")) == "g++ is not there"


def test_a_model_that_was_only_looked_at_is_as_it_was():
    model = tiny_model("llama").train()
    build_network(model, "causal_lm", attention="eager", fused=False)
    assert model.training
    assert not any("forward" in vars(module) for module in model.modules())
