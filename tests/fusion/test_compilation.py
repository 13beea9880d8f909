"""Compiling: element-wise work of fused forms, or whole layers where there are none; and what refuses it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_cli.adapters.injection import adapters_of
from lora_cli.adapters.quantized import quantized
from lora_cli.data.batches import PADDED
from lora_cli.errors import UsageError
from lora_cli.fusion import attention, forms, proof
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_compiled_network, build_network
from lora_cli.fusion.recompute import checkpoint_activations
from lora_cli.ops import kernels, liger
from lora_cli.ops.kernels import Kernels
from tests.conftest import tiny_model
from tests.fusion.test_networks import CAUSAL, CLASSIFIERS, adapted, loss_and_gradients, rows_of, worst
from tests.ops.formulas import FORMULAS


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
    norms, gated = {"_rms_norm_forward", "_rms_norm_backward"}, {"_inner", "_inner_backward"}
    assert set(formulas) == norms | gated | {"_rotated_by_halves", "_losses_and_gradient"}
    assert layers == []


def served(network: Network) -> dict[str, set[str]]:
    """The kernels of each kind of form."""
    found: dict[str, set[str]] = {}
    for module in network.model.modules():
        form = vars(module).get("forward")
        if form is not None and any(isinstance(argument, Kernels) for argument in form.args):
            found.setdefault(forms.name_of(form), set()).add(str(forms.kernels_of(form)))
    return found


def failing(monkeypatch: pytest.MonkeyPatch, formula_name: str, result: object) -> None:
    """A compiler whose kernel of one formula raises, or gives something else."""

    def compiled(formula):
        def kernel(*inputs):
            if isinstance(result, Exception):
                raise result
            return result(formula(*inputs))

        return kernel if formula.__name__ == formula_name else formula

    pretend(monkeypatch)
    monkeypatch.setattr(kernels, "_compiled", compiled)


@pytest.mark.parametrize("formula", ["_rms_norm_backward", "_inner_backward"])
@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (RuntimeError("\nno such instruction\nmore"), "no such instruction"),
        (lambda found: tuple(-3 * t for t in found) if isinstance(found, tuple) else -3 * found, "another gradient"),
    ],
)
def test_kernels_that_fail_backward_are_found_before_the_first_step_and_not_used(formula, result, reason, monkeypatch):
    build = lambda: adapted("llama", "causal_lm", CAUSAL["llama"][0])  # noqa: E731
    plain = build_network(build(), "causal_lm")
    failing(monkeypatch, formula, result)
    network = build_compiled_network(build(), "causal_lm")
    (note,) = network.notes
    assert note.startswith("element-wise work is not compiled: the backward pass fails: ")
    assert reason in note
    assert (network.forms, network.layout) == (plain.forms, plain.layout)
    ours, other = (loss_and_gradients(n, "causal_lm", rows_of("causal_lm")) for n in (network, plain))
    assert worst(ours, other) == 0


def test_kernels_that_fail_forward_cost_no_fused_form(monkeypatch):
    build = lambda: adapted("llama", "causal_lm", CAUSAL["llama"][0])  # noqa: E731
    plain = build_network(build(), "causal_lm")
    failing(monkeypatch, "_inner", RuntimeError("no such instruction"))
    network = build_compiled_network(build(), "causal_lm")
    (note,) = network.notes
    assert note == "element-wise work is not compiled in some forms: compiled forms fail or give something else"
    assert network.forms == plain.forms
    assert served(network) == {"norm": {"compiled"}, "attention": {"compiled"}, "gated": {"plain"}}


@pytest.mark.parametrize(
    ("result", "notes"),
    [
        (RuntimeError("no such instruction"), ("the loss is not compiled: no such instruction",)),
        (lambda x: -3 * x, ("the loss is not compiled: it gives something else",)),
    ],
)
def test_a_kernel_of_the_loss_is_used_only_where_it_gives_the_loss(result, notes, monkeypatch):
    build = lambda: adapted("llama", "causal_lm", CAUSAL["llama"][0])  # noqa: E731
    plain = build_network(build(), "causal_lm")
    pretend(monkeypatch)
    assert build_compiled_network(build(), "causal_lm").head.kernels is Kernels.COMPILED
    failing(monkeypatch, "_losses_and_gradient", result)
    network = build_compiled_network(build(), "causal_lm")
    assert network.notes == notes
    assert network.head.kernels is Kernels.PLAIN
    ours, other = (loss_and_gradients(n, "causal_lm", rows_of("causal_lm")) for n in (network, plain))
    assert worst(ours, other) < 1e-6


def liger_with(monkeypatch: pytest.MonkeyPatch, **others: object) -> Network:
    """A llama by Liger's kernels, which are our formulas but for ``others``."""
    pretend(monkeypatch)
    monkeypatch.setattr(liger, "KERNELS", FORMULAS | others)
    return build_network(adapted("llama", "causal_lm", CAUSAL["llama"][0]), "causal_lm", kernels=Kernels.LIGER)


class KernelError(Exception):
    """As Triton's own: of no kind that torch raises."""


def raising(*inputs: object) -> object:
    raise KernelError("there is none")


def test_liger_s_kernels_serve_every_form_that_they_are_right_for_and_the_loss(monkeypatch):
    network = liger_with(monkeypatch)
    assert network.notes == ()
    assert served(network) == {form: {"liger"} for form in ("norm", "attention", "gated")}
    assert network.head.kernels is Kernels.LIGER
    ours = loss_and_gradients(network, "causal_lm", rows_of("causal_lm"))
    plain = build_network(adapted("llama", "causal_lm", CAUSAL["llama"][0]), "causal_lm")
    assert worst(ours, loss_and_gradients(plain, "causal_lm", rows_of("causal_lm"))) < 1e-5


@pytest.mark.parametrize("wrong", [raising, lambda *inputs: -3 * FORMULAS["_inner"](*inputs)])
def test_what_liger_has_no_right_kernel_for_is_compiled(wrong, monkeypatch):
    network = liger_with(monkeypatch, _inner=wrong, _losses_and_gradient=raising)
    assert served(network) == {"norm": {"liger"}, "attention": {"liger"}, "gated": {"compiled"}}
    assert network.head.kernels is Kernels.COMPILED
    assert network.notes == (
        "Liger's kernels do not serve gated: they fail, give something else, or there are none",
        "the loss is not Liger's: there is none",
    )


def test_liger_s_kernels_that_fail_backward_are_not_used(monkeypatch):
    network = liger_with(monkeypatch, _rms_norm_backward=raising)
    assert network.notes == ("Liger's kernels are not used: the backward pass fails: there is none",)
    assert served(network) == {form: {"compiled"} for form in ("norm", "attention", "gated")}
    loss_and_gradients(network, "causal_lm", rows_of("causal_lm"))


def test_a_model_without_forms_is_told_that_liger_serves_none(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setattr(liger, "KERNELS", FORMULAS)
    network = build_network(adapted("gpt2", "causal_lm", CAUSAL["gpt2"][0]), "causal_lm", kernels=Kernels.LIGER)
    assert network.notes == ("Liger's kernels serve none of this model's layers",)
    assert network.head.kernels is Kernels.LIGER, "its loss they do"


def test_attention_that_fails_backward_is_found_before_the_first_step_and_rows_are_padded(monkeypatch):
    """As flash attention of a library might, on a device that this version of it does not know."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no kernel image is available")

    own = forms.attend_rows
    monkeypatch.setattr(forms, "attend_rows", lambda *inputs: Fails.apply(own(*inputs)))
    monkeypatch.setattr(attention, "attend_rows", lambda *inputs: Fails.apply(own(*inputs)))
    formulas, _ = pretend(monkeypatch)
    network = build_compiled_network(adapted("llama", "causal_lm", CAUSAL["llama"][0]), "causal_lm")
    assert network.notes == ("rows are padded: the backward pass fails: no kernel image is available",)
    assert network.layout == PADDED
    assert set(network.forms) == {"norm", "gated"}
    assert "_inner" in formulas, "what is not to blame is still compiled"
    assert network.head.kernels is Kernels.COMPILED
    loss_and_gradients(network, "causal_lm", rows_of("causal_lm"))
    untried = build_network(adapted("llama", "causal_lm", CAUSAL["llama"][0]), "causal_lm")
    with pytest.raises(RuntimeError, match="no kernel image"):  # without a trial the first step would meet it
        loss_and_gradients(untried, "causal_lm", rows_of("causal_lm"))


@pytest.mark.parametrize(
    ("kind", "task"),
    [*((kind, "causal_lm") for kind in CAUSAL), *((kind, "sequence_classification") for kind in CLASSIFIERS)],
)
def test_the_trial_of_the_backward_pass_refuses_nothing_that_is_right(kind, task, monkeypatch):
    pretend(monkeypatch)
    tried = []
    own = proof.embedding_gradient
    monkeypatch.setattr(proof, "embedding_gradient", lambda *given: tried.append(own(*given)) or tried[-1])
    changes = (CAUSAL if task == "causal_lm" else CLASSIFIERS)[kind][0]
    plain = build_network(adapted(kind, task, changes), task)
    assert not tried, "nothing is tried that torch's own operations do"
    network = build_network(adapted(kind, task, changes), task, kernels=Kernels.COMPILED)
    *each, together = tried[:4]
    alone = torch.cat(each)
    assert float((together - alone).norm() / alone.norm()) < 1e-4
    assert (network.notes, network.forms, network.layout) == (plain.notes, plain.forms, plain.layout)


def test_a_model_whose_embeddings_are_no_beginning_is_not_tried_and_runs(monkeypatch):
    """CTRL writes into them, and XLNet turns them around."""
    pretend(monkeypatch)
    model = adapted("llama", "causal_lm", CAUSAL["llama"][0])
    with monkeypatch.context() as patch:
        patch.setattr(proof, "embedding_gradient", refuse)
        network = build_network(model, "causal_lm", kernels=Kernels.COMPILED)
    (note,) = network.notes
    assert note == "the backward pass is not tried ahead of the first step: a leaf is written into"
    assert network.end_to_end
    loss_and_gradients(network, "causal_lm", rows_of("causal_lm"))


def refuse(*given: object) -> None:
    raise RuntimeError("a leaf is written into")


def test_a_last_layer_that_fails_backward_runs_whole(monkeypatch):
    pretend(monkeypatch)
    build = lambda: adapted("llama", "causal_lm", CAUSAL["llama"][0])  # noqa: E731
    assert build_compiled_network(build(), "causal_lm").layout.looks_at == "targets"
    own = proof.embedding_gradient

    def wrong(network, batch, task):
        found = own(network, batch, task)
        return -found if batch.ending is not None else found

    monkeypatch.setattr(proof, "embedding_gradient", wrong)
    assert build_compiled_network(build(), "causal_lm").layout.looks_at is None


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_a_model_without_fused_forms_has_its_layers_compiled_with_rows_side_by_side(kind, monkeypatch):
    formulas, layers = pretend(monkeypatch)
    build = lambda: adapted(kind, "causal_lm", CAUSAL[kind][0])  # noqa: E731
    network, plain = build_compiled_network(build(), "causal_lm"), build_network(build(), "causal_lm")
    assert len(layers) == 2
    assert all("forward" not in vars(layer) for layer in layers), "whole layers, the last one too"
    assert set(formulas) == {"_losses_and_gradient"}
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


def test_whole_layers_whose_inputs_wait_on_the_host_are_not_compiled_and_fused_forms_are(monkeypatch):
    formulas, layers = pretend(monkeypatch)
    for kind, refused in [("gpt2", True), ("llama", False)]:
        model = adapted(kind, "causal_lm", CAUSAL[kind][0])
        checkpoint_activations(model, "offload")
        with pytest.raises(UsageError, match="inputs wait on the host") if refused else nullcontext():
            build_compiled_network(model, "causal_lm")
        assert layers == []
    assert "_inner_backward" in formulas


def test_without_a_compiler_it_is_refused_by_name_and_cuda_s_own_wish_is_only_noted(monkeypatch):
    pretend(monkeypatch, "no C++ compiler")
    model = adapted("llama", "causal_lm", CAUSAL["llama"][0])
    with pytest.raises(UsageError, match="torch_compile cannot work here: no C\\+\\+ compiler"):
        build_compiled_network(model, "causal_lm")
    network = build_network(model, "causal_lm", kernels=Kernels.COMPILED)
    assert network.notes == ("element-wise work is not compiled: no C++ compiler",)
    assert network.forms


def test_the_reason_is_the_error_s_first_line(monkeypatch):
    def broken(formula):
        raise RuntimeError("\n  g++ is not there\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    assert kernels.why_not_compiled.__wrapped__(torch.device("cpu")) == "g++ is not there"


def test_a_model_that_was_only_looked_at_is_as_it_was():
    model = tiny_model("llama").train()
    build_network(model, "causal_lm", attention="eager", fused=False)
    assert model.training
    assert not any("forward" in vars(module) for module in model.modules())
