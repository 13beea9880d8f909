"""Frozen layers that are run once a row: the same losses and gradients, and who is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lora_cli.adapters.initialisation import initialise
from lora_cli.adapters.injection import adapters_of, attach, freeze_base
from lora_cli.adapters.layer import Parametrisation
from lora_cli.adapters.targets import find_saved, find_targets
from lora_cli.data.batches import Batch, collate
from lora_cli.data.encoding import Example
from lora_cli.errors import RecipeError
from lora_cli.fusion.frozen import FrozenLayers, groups_of, rows_of
from lora_cli.fusion.layers import layer_list
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_network
from lora_cli.fusion.recompute import checkpoint_activations
from lora_cli.fusion.skipping import skippable, skipping
from lora_cli.fusion.states import DiskStates, MemoryStates, States, key_of
from lora_cli.models import head_modules, heed_soft_cap
from lora_cli.recipe import LoraSection
from lora_cli.tasks import TASKS
from lora_cli.training.optimizer import trained_parameters
from tests.conftest import AUTO
from tests.fusion.test_networks import CAUSAL, CLASSIFIERS, GROUPED, SMALL
from tests.fusion.test_networks import rows_of as rows_for

CLASSIFY = "sequence_classification"
DEPTHS = {"gpt2": "n_layer", "distilbert": "n_layers"}
LAYERS, FIRST = 4, 2  # the first two are frozen
UNLISTED = {"albert"}  # its layers share their weights


def adapted(
    kind: str = "llama",
    task: str = "causal_lm",
    values: dict[str, Any] | None = None,
    layers: tuple[int, ...] | None = (2, 3),
    saved: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    lora_dropout: float = 0.0,
) -> Any:
    """Adapters on the upper layers (none at all where ``layers`` is empty), their B not zero; no dropout below."""
    torch.manual_seed(0)
    depth = {DEPTHS.get(kind, "num_hidden_layers"): LAYERS}
    config = AutoConfig.for_model(kind, **{k: v for k, v in (values or GROUPED).items() if k != "n_layer"} | depth)
    for name in list(vars(config)):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    model = AUTO[task].from_config(config)
    heed_soft_cap(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    model.to(dtype)
    full = [*head_modules(model, task), *find_saved(model, list(saved))]
    if layers != ():
        section = LoraSection(r=3, lora_alpha=5, layers_to_transform=None if layers is None else list(layers))
        attach(model, find_targets(model, section, full), Parametrisation(lora_dropout))
    freeze_base(model, full)
    initialise(adapters_of(model), LoraSection(), 0)
    for layer in adapters_of(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model.train()


def with_cache(network: Network, rows: list[Example], states: States | None = None, batch_size: int = 2) -> Network:
    return skipping(network, MemoryStates() if states is None else states, rows, batch_size, 0)


def step(network: Network, task: str, rows: list[Example], size: int = 2) -> dict[str, Tensor]:
    """Loss and gradients of these rows in micro-batches of ``size``."""
    torch.manual_seed(3)
    network.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(rows), size):
        loss = TASKS[task].loss_sum(network, collate(rows[start : start + size], 0, network.layout))
        loss.backward()
        total += loss.detach()
    found = {name: p.grad.clone() for name, p in trained_parameters(network.model).items() if p.grad is not None}
    return found | {"loss": total}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    size = max(float(g.norm()) for name, g in theirs.items() if name != "loss")
    gradients = max(float((ours[name] - theirs[name]).norm()) / size for name in theirs if name != "loss")
    return max(gradients, float(abs(ours["loss"] - theirs["loss"]) / theirs["loss"]))


def calls_of(model: Any) -> Counter[int]:
    """How often each layer's last norm runs: what comes before attention may run twice in the last layer."""
    counts: Counter[int] = Counter()
    layers = layer_list(model)
    assert layers is not None

    def counting(number: int) -> Callable[..., None]:
        return lambda *_: counts.update([number])

    for number, layer in enumerate(layers):
        *_, last = (
            module for module in layer.modules() if isinstance(module, nn.LayerNorm) or "Norm" in type(module).__name__
        )
        last.register_forward_hook(counting(number))
    return counts


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_language_model_gives_the_same_loss_and_gradients(kind):
    """Twice: while the states are computed, and when they are there."""
    values, end_to_end, _ = CAUSAL[kind]
    rows = rows_for("causal_lm")
    network = build_network(adapted(kind, values=values), "causal_lm")
    assert network.end_to_end is end_to_end
    plain = step(network, "causal_lm", rows)
    cached = with_cache(network, rows)
    for _ in range(2):
        assert worst(step(cached, "causal_lm", rows), plain) < 1e-6


@pytest.mark.parametrize("kind", [kind for kind in CLASSIFIERS if kind not in UNLISTED])
@pytest.mark.parametrize("layers", [(2, 3), ()], ids=["lora", "head"])
def test_a_classifier_gives_the_same_loss_and_gradients(kind, layers):
    """Its head alone too: everything below is frozen then."""
    values, _ = CLASSIFIERS[kind]
    rows = rows_for(CLASSIFY)
    network = build_network(adapted(kind, CLASSIFY, values, layers), CLASSIFY)
    plain = step(network, CLASSIFY, rows)
    cached = with_cache(network, rows)
    assert cached.frozen is not None
    assert cached.frozen.depth == (FIRST if layers else LAYERS)
    for _ in range(2):
        assert worst(step(cached, CLASSIFY, rows), plain) < 1e-6


@pytest.mark.parametrize("attention", ["auto", "sdpa"], ids=["end to end", "padded"])
@pytest.mark.parametrize("how", [False, True, "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_with_recomputation_and_dropout_in_the_adapters(attention, how, dropout):
    """The dropout falls as without a cache: nothing below draws."""
    rows = rows_for("causal_lm")
    network = build_network(adapted(lora_dropout=dropout), "causal_lm", attention=attention)
    if how:
        checkpoint_activations(network.model, how)
    plain = step(network, "causal_lm", rows)
    cached = with_cache(network, rows)
    for size in (2, 1, 5) if not dropout else (2, 2):
        assert worst(step(cached, "causal_lm", rows, size), plain) < 1e-6


def test_any_cut_into_micro_batches_finds_the_same_rows():
    rows = rows_for("causal_lm")
    network = build_network(adapted(), "causal_lm")
    plain = step(network, "causal_lm", rows, 5)
    cached = with_cache(network, rows)
    counts = calls_of(network.model)
    for size in (5, 1, 3, 2):
        assert worst(step(cached, "causal_lm", list(reversed(rows)), size), plain) < 1e-6
    assert (counts[0], counts[1]) == (3, 3), "five rows in groups of two, once"
    assert counts[2] == counts[3] == 1 + 5 + 2 + 3


def test_with_everything_in_memory_no_lower_layer_is_run():
    rows = rows_for("causal_lm")
    network = build_network(adapted(), "causal_lm")
    cached = with_cache(network, rows)
    step(cached, "causal_lm", rows)
    counts = calls_of(network.model)
    step(cached, "causal_lm", rows)
    with torch.no_grad():
        cached.hidden(collate(rows, 0, cached.layout))
    assert counts == {2: 4, 3: 4}


def test_a_batch_with_one_new_row_computes_only_that_row_s_group():
    rows = rows_for("causal_lm")
    network = build_network(adapted(), "causal_lm")
    cached = with_cache(network, rows, batch_size=1)
    step(cached, "causal_lm", rows[:4])
    counts = calls_of(network.model)
    step(cached, "causal_lm", rows, 5)
    assert counts == {0: 1, 1: 1, 2: 1, 3: 1}


def test_a_row_from_elsewhere_is_computed_alone():
    rows = rows_for("causal_lm")
    network = build_network(adapted(), "causal_lm")
    plain = step(network, "causal_lm", rows)
    assert worst(step(with_cache(network, rows[:2]), "causal_lm", rows), plain) < 1e-6


def test_memory_and_disk_hold_the_same_bytes_in_bfloat16_too(tmp_path):
    rows = rows_for("causal_lm")
    network = build_network(adapted(dtype=torch.bfloat16), "causal_lm")
    memory, disk = MemoryStates(), DiskStates(tmp_path)
    results = [step(with_cache(network, rows, states), "causal_lm", rows) for states in (memory, disk)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    for row in rows:
        assert memory.get(key_of(row)).dtype == torch.bfloat16
        assert memory.get(key_of(row)).shape == (len(row.input_ids), 32)
        assert torch.equal(memory.get(key_of(row)), disk.get(key_of(row)))
    assert memory.get(key_of(rows[0])).untyped_storage().nbytes() == memory.get(key_of(rows[0])).nbytes


def test_states_do_not_depend_on_the_order_in_which_rows_are_asked_for():
    """Bit for bit, which is what a resumed run needs."""
    rows = rows_for("causal_lm")
    network = build_network(adapted(), "causal_lm")
    one, other = MemoryStates(), MemoryStates()
    step(with_cache(network, rows, one), "causal_lm", rows, 5)
    for row in reversed(rows):
        step(with_cache(network, rows, other), "causal_lm", [row])
    assert all(torch.equal(one.get(key_of(row)), other.get(key_of(row))) for row in rows)


def test_equal_rows_are_one():
    rows = rows_for("causal_lm")
    assert [len(group) for group in groups_of([*rows, *rows], 2)] == [2, 2, 1]
    assert [len(row.input_ids) for group in groups_of(rows, 2) for row in group] == [30, 17, 9, 4, 2]


def test_a_filled_line_gives_the_same():
    rows = rows_for("causal_lm")
    network = build_network(adapted(), "causal_lm")
    plain = step(network, "causal_lm", rows)
    filled = replace(network, layout=replace(network.layout, multiple=48))
    assert worst(step(with_cache(filled, rows), "causal_lm", rows), plain) < 1e-6


def test_the_model_is_whole_again_after_every_pass():
    rows = rows_for("causal_lm")
    network = build_network(adapted(), "causal_lm")
    layers = list(network.model.model.layers)
    cached = with_cache(network, rows)
    step(cached, "causal_lm", rows)
    assert list(network.model.model.layers) == layers
    assert cached.frozen is not None
    assert cached.frozen._skipping[-1].instead is None, "a batch's states are not held"


# --- who is refused -------------------------------------------------------------------------------------------


def refusal(model: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        skippable(model)
    (mistake,) = caught.value.mistakes
    assert mistake.name == "training.cache_frozen_layers"
    return mistake.message


def test_nothing_to_skip():
    assert refusal(adapted(layers=None)).startswith("has nothing to skip: layer 0 is trained")
    assert "model.embed_tokens is trained" in refusal(adapted(saved=("embed_tokens",)))
    assert skippable(adapted(saved=("lm_head",))) == FIRST
    assert skippable(adapted(layers=(), saved=("lm_head",))) == LAYERS
    assert skippable(adapted(saved=("model.norm",))) == FIRST
    assert skippable(adapted(layers=(1,))) == 1


def test_layers_that_share_their_weights_are_no_list():
    values, _ = CLASSIFIERS["albert"]
    assert "albert models do not run through a single list of layers" in refusal(
        adapted("albert", CLASSIFY, values, ())
    )


@pytest.mark.parametrize(
    ("kind", "task", "values", "named"),
    [
        ("gpt2", "causal_lm", CAUSAL["gpt2"][0] | {"embd_pdrop": 0.1}, "transformer.drop.p = 0.1"),
        ("gpt2", "causal_lm", CAUSAL["gpt2"][0] | {"resid_pdrop": 0.1}, "transformer.h.0.attn.resid_dropout.p = 0.1"),
        ("bert", CLASSIFY, SMALL | {"hidden_dropout_prob": 0.1}, "bert.embeddings.dropout.p = 0.1"),
        (
            "llama",
            "causal_lm",
            GROUPED | {"attention_dropout": 0.1},
            "model.layers.0.self_attn.attention_dropout = 0.1",
        ),
        ("opt", "causal_lm", CAUSAL["opt"][0] | {"layerdrop": 0.1}, "model.decoder.layerdrop = 0.1"),
    ],
)
def test_dropout_below_is_refused_by_name(kind, task, values, named, monkeypatch):
    dropouts = {key: value for key, value in values.items() if "drop" in key}
    model = adapted(kind, task, {key: value for key, value in values.items() if key not in dropouts})
    assert skippable(model) == FIRST
    config = model.config
    for key, value in dropouts.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    with_dropout = AUTO[task].from_config(config)
    full = head_modules(with_dropout, task)
    attach(with_dropout, find_targets(with_dropout, LoraSection(r=2, layers_to_transform=[2, 3]), full))
    freeze_base(with_dropout, full)
    assert named in refusal(with_dropout)


def test_dropout_above_is_no_matter():
    """A classifier's own, ahead of its head."""
    model = adapted("bert", CLASSIFY, SMALL)
    model.dropout.p = 0.5
    assert skippable(model) == FIRST


def proof_s_words(model: Any, rows: list[Example]) -> str:
    with pytest.raises(RecipeError) as caught:
        with_cache(Network(model), rows)
    return caught.value.mistakes[0].message


def test_chance_that_no_attribute_shows_is_found_by_running():
    model = adapted()
    lower = model.model.layers[1].mlp
    lower.register_forward_hook(lambda module, args, output: output + 1e-3 * torch.rand_like(output))
    assert "give other states each time" in proof_s_words(model, rows_for("causal_lm"))


def test_layers_that_take_earlier_states_are_refused():
    """As value residuals are: the third layer adds what the first one was given."""
    model = adapted()
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model.model.layers[2].register_forward_hook(lambda module, args, output: output + 0.05 * seen[-1])
    assert "take more from the lower ones than the last hidden states" in proof_s_words(model, rows_for("causal_lm"))


def test_layers_that_fail_without_the_lower_ones_are_refused():
    model = adapted()
    seen: dict[str, Tensor] = {}
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.update(value=output))
    model.model.layers[2].register_forward_hook(lambda module, args, output: output + 0 * seen.pop("value"))
    assert "do not run without the lower ones" in proof_s_words(model, rows_for("causal_lm"))


def test_something_trained_that_feeds_the_lower_layers_is_found_by_running():
    """A name cannot tell: here the last norm's weight is added to what the first layer is given."""
    model = adapted(saved=("model.norm",))
    norm = model.model.norm
    model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] + norm.weight, *args[1:]))
    assert "something that is trained" in proof_s_words(model, rows_for("causal_lm"))


def test_states_are_the_rows_own_in_both_layouts():
    rows = rows_for("causal_lm")
    model = adapted()
    network = build_network(model, "causal_lm")
    padded = Network(adapted())
    found = []
    for way in (network, padded):
        cached = with_cache(way, rows)
        frozen: FrozenLayers | None = cached.frozen
        assert frozen is not None
        batch: Batch = collate(rows, 0, way.layout)
        with torch.no_grad():
            found.append(rows_of(frozen.arriving(batch, way.base_output), batch, way.layout))
    for one, other, row in zip(*found, rows, strict=True):
        assert one.shape == (len(row.input_ids), 32)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
