"""Activations that are computed again: which layers do it, what is kept meanwhile, and that nothing else changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_cli.adapters.initialisation import initialise
from lora_cli.adapters.injection import adapters_of, attach, freeze_base
from lora_cli.adapters.layer import Parametrisation
from lora_cli.adapters.targets import find_targets
from lora_cli.data.batches import collate
from lora_cli.fusion import offloading, recompute
from lora_cli.fusion.layers import repeated_layers
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_network
from lora_cli.fusion.recompute import checkpoint_activations, refuses
from lora_cli.recipe import LoraSection
from lora_cli.tasks import CausalLM
from lora_cli.training.optimizer import trained_parameters
from tests.conftest import tiny_model
from tests.fusion.test_networks import rows_of

LAYERS = 4
HOW = [True, "selective", "offload"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def adapted(kind: str = "llama", dropout: float = 0.0, layers: list[int] | None = None, **changes: Any) -> Any:
    depth = {"llama": "num_hidden_layers", "gpt2": "n_layer"}[kind]
    model = tiny_model(kind, **{depth: LAYERS} | changes)
    section = LoraSection(r=3, lora_dropout=dropout, layers_to_transform=layers)
    attach(model, find_targets(model, section, []), Parametrisation(dropout))
    freeze_base(model, [])
    initialise(adapters_of(model), LoraSection(), 0)
    for layer in adapters_of(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model.train()


def gradients(network: Network) -> dict[str, Tensor]:
    """Of one batch, with the chance of one seed."""
    torch.manual_seed(7)
    network.model.zero_grad()
    loss = CausalLM.loss_sum(network, collate(rows_of("causal_lm"), 0, network.layout))
    loss.backward()
    found = {name: p.grad.clone() for name, p in trained_parameters(network.model).items() if p.grad is not None}
    return found | {"loss": loss.detach()}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


class Host:
    """Takes the place of the pinned memory of a CUDA device's host, and notes what comes and goes."""

    def __init__(self) -> None:
        self.bytes = 0
        self.copies: list[weakref.ref[Tensor]] = []
        self.originals: list[weakref.ref[Tensor]] = []
        self.sent: list[int] = []  # numbers of those that were asked back
        self.arrived: list[int] = []

    def out(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.nbytes
        self.originals.append(weakref.ref(tensor))
        copy = tensor.clone()
        self.copies.append(weakref.ref(copy))
        return copy

    def back(self, host: Tensor) -> Callable[[], Tensor]:
        number = next(number for number, copy in enumerate(self.copies) if copy() is host)
        self.sent.append(number)
        tensor = host.clone()

        def arrived() -> Tensor:
            self.arrived.append(number)
            return tensor

        return arrived


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(offloading, "lane_of", lambda device: host)
    return host


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """The bytes of every tensor that the forward pass keeps for the backward pass, each storage once."""
    sizes: dict[int, int] = {}
    total: list[int] = []
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)  # so that no address is used twice
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(sizes.values()))


def kept_by(network: Network, rows: int = 4) -> int:
    examples = rows_of("causal_lm") * rows
    with kept_bytes() as total:
        CausalLM.loss_sum(network, collate(examples, 0, network.layout))
    return total[0]


def counted_forwards(model: Any) -> list[int]:
    """How often each layer's first norm runs."""
    counts = [0] * LAYERS
    norms = [m for name, m in model.named_modules() if name.endswith(("input_layernorm", "ln_1"))]

    def counting(number: int) -> Callable[..., None]:
        def note(*_: Any) -> None:
            counts[number] += 1

        return note

    for number, norm in enumerate(norms):
        norm.register_forward_hook(counting(number))
    return counts


@pytest.mark.parametrize(
    ("how", "forwards"), [(True, [2, 2, 2, 2]), ("selective", [2, 1, 2, 1]), ("offload", [2, 2, 2, 2])]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_which_layers_are_computed_twice(kind, how, forwards, host):
    model = adapted(kind)
    checkpoint_activations(model, how)
    counts = counted_forwards(model)
    gradients(Network(model))
    assert counts == forwards


@pytest.mark.parametrize("way", [Network, lambda model: build_network(model, "causal_lm")], ids=["padded", "fast"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_gradients_are_those_of_a_single_forward_pass(kind, how, dropout, way, host):
    network = way(adapted(kind, dropout))
    plain = gradients(network)
    checkpoint_activations(network.model, how)
    assert difference(gradients(network), plain) < 1e-6


@pytest.mark.parametrize("way", [Network, lambda model: build_network(model, "causal_lm")], ids=["padded", "fast"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}), ("llama", {"attention_dropout": 0.3})],
)
@pytest.mark.parametrize("how", HOW)
def test_the_base_s_own_dropout_falls_alike_too(how, kind, changes, way, host):
    network = way(adapted(kind, **changes))
    plain = gradients(network)
    checkpoint_activations(network.model, how)
    assert difference(gradients(network), plain) < 1e-6


def test_a_forgotten_state_of_chance_would_be_noticed(host, monkeypatch):
    """The negative control of the two tests above."""
    network = Network(adapted(dropout=0.3))
    plain = gradients(network)
    checkpoint_activations(network.model, "offload")
    monkeypatch.setattr(offloading.torch, "set_rng_state", lambda state: None)
    assert difference(gradients(network), plain) > 1e-2


def test_after_a_recomputation_chance_goes_on_where_it_was(host):
    network = Network(adapted(dropout=0.3))
    gradients(network)
    after_plain = torch.rand(1)
    checkpoint_activations(network.model, "offload")
    gradients(network)
    assert torch.equal(torch.rand(1), after_plain)


def test_what_is_kept_falls_with_selective_by_half_and_with_true_by_most():
    """Beside the layers, the head's part is kept in any case: differences are compared."""
    kept = {}
    for how in (False, "selective", True):
        network = build_network(adapted(), "causal_lm")
        if how:
            checkpoint_activations(network.model, how)
        kept[how] = kept_by(network)
    saved, half = kept[False] - kept[True], kept[False] - kept["selective"]
    assert kept[True] < kept[False] / 3
    assert half == pytest.approx(saved / 2, rel=0.1)


def test_offloading_keeps_less_than_true_by_the_layers_inputs_which_lie_on_the_host(host):
    recomputed, offloaded = (build_network(adapted(), "causal_lm") for _ in range(2))
    checkpoint_activations(recomputed.model, True)
    checkpoint_activations(offloaded.model, "offload")
    tokens = 4 * sum(len(row.input_ids) for row in rows_of("causal_lm"))
    inputs = LAYERS * tokens * 32 * 4
    saved = kept_by(recomputed) - kept_by(offloaded)
    tables = tokens * (2 * 8 * 4 + 8)  # of positions, once for all layers; torch's own way keeps them uncounted
    assert host.bytes == inputs
    assert saved == inputs - tables


def test_a_stowed_tensor_is_freed_before_the_backward_pass(host):
    network = build_network(adapted(), "causal_lm")
    checkpoint_activations(network.model, "offload")
    loss = CausalLM.loss_sum(network, collate(rows_of("causal_lm"), 0, network.layout))
    assert [original() for original in host.originals] == [None] * LAYERS
    loss.backward()
    assert host.arrived == [3, 2, 1, 0]


def test_what_a_layer_needs_is_sent_for_while_the_layer_above_is_computed_again(host):
    model = adapted()
    checkpoint_activations(model, "offload")
    seen: list[list[int]] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: seen.append(list(host.sent)))
    gradients(Network(model))
    assert seen == [*[[]] * LAYERS, [3, 2], [3, 2, 1], [3, 2, 1, 0], [3, 2, 1, 0]]
    assert host.arrived == [3, 2, 1, 0]
    gradients(Network(model))
    assert host.sent[LAYERS:] == host.arrived[LAYERS:] == [7, 6, 5, 4], "of the pass before, nothing is sent for"


def test_the_host_s_copies_are_given_back_as_soon_as_they_have_arrived(host):
    """Though someone still holds the loss, and so the graph."""
    model = adapted()
    checkpoint_activations(model, "offload")
    network = Network(model)
    loss = CausalLM.loss_sum(network, collate(rows_of("causal_lm"), 0, network.layout))
    assert all(copy() is not None for copy in host.copies)
    loss.backward()
    assert [copy() for copy in host.copies] == [None] * LAYERS


def test_an_unfinished_pass_is_not_fetched_by_the_next_one(host):
    model = adapted()
    checkpoint_activations(model, "offload")
    network = Network(model)
    CausalLM.loss_sum(network, collate(rows_of("causal_lm"), 0, network.layout))
    gradients(network)
    assert host.sent == [7, 6, 5, 4]


@pytest.mark.parametrize("how", HOW)
def test_layers_below_everything_that_is_trained_are_not_computed_twice(how, host):
    model = adapted(layers=[2, 3])
    plain = gradients(Network(model))
    checkpoint_activations(model, how)
    counts = counted_forwards(model)
    assert difference(gradients(Network(model)), plain) < 1e-6
    assert counts == ([1, 1, 2, 1] if how == "selective" else [1, 1, 2, 2])


@pytest.mark.parametrize("how", HOW)
def test_an_evaluation_keeps_and_stows_nothing(how, host):
    network = build_network(adapted(), "causal_lm")
    checkpoint_activations(network.model, how)
    with torch.no_grad():
        CausalLM.loss_sum(network, collate(rows_of("causal_lm"), 0, network.layout))
    assert host.bytes == 0


def test_offload_is_for_a_cuda_device():
    model = tiny_model("llama")
    assert refuses(model, "offload", CUDA) is None
    for device in (CPU, torch.device("mps")):
        reason = refuses(model, "offload", device)
        assert reason is not None
        assert f"on {device.type} there is only one memory" in reason
    assert [refuses(model, how, CPU) for how in (False, True, "selective")] == [None] * 3


def test_a_layer_inside_another_one_is_part_of_it():
    model = tiny_model("llama", num_hidden_layers=3)
    assert list(repeated_layers(model)) == [f"model.layers.{i}" for i in range(3)]
    inner = model.model.layers[0]
    inner.inner = model.model.layers[2]
    assert list(repeated_layers(model)) == ["model.layers.0", "model.layers.1"], "the third is the first one's own"


def test_the_command_line_refuses_offload_by_name_on_the_cpu(recipe, lora):
    result = lora("check", recipe(), "training.gradient_checkpointing=offload")
    assert result.code == 2
    assert "--> argument training.gradient_checkpointing=offload" in result.err
    assert "offload moves activations from a CUDA device's memory" in result.err
    assert "write true" in result.err


def test_models_that_cannot_are_refused_by_name(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(recompute, "repeated_layers", lambda model: {})
    assert refuses(model, True, CUDA) is None, "transformers itself may know a way"
    for how in ("selective", "offload"):
        assert (
            refuses(model, how, CUDA)
            == "can only be true or false for llama models, which recompute in a way of their own"
        )
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    assert refuses(model, "selective", CUDA) == "is not supported by llama models"
    assert refuses(model, False, CUDA) is None


@pytest.mark.gpu
def test_on_a_gpu_the_inputs_wait_in_pinned_memory():
    network = build_network(adapted().cuda(), "causal_lm")

    def step() -> dict[str, Tensor]:
        network.model.zero_grad()
        batch = collate(rows_of("causal_lm"), 0, network.layout).to(CUDA)
        CausalLM.loss_sum(network, batch).backward()
        return {name: p.grad.clone() for name, p in trained_parameters(network.model).items() if p.grad is not None}

    plain = step()
    checkpoint_activations(network.model, "offload")
    assert difference(step(), plain) < 1e-5
