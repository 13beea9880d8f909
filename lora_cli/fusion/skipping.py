"""Whether a model's frozen layers may be run once a row, found out on the model itself before the first step."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from lora_cli.data.batches import collate
from lora_cli.data.encoding import Example
from lora_cli.errors import Mistake, RecipeError
from lora_cli.fusion.forms import TOLERANCES, close
from lora_cli.fusion.frozen import FrozenLayers, groups_of, rows_of
from lora_cli.fusion.layers import chance_below, layer_list, lowest_trained
from lora_cli.fusion.network import Network
from lora_cli.fusion.states import MemoryStates, States

KEY = ("training", "cache_frozen_layers")
PROBES = 3
SOMETHING_ELSE = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError, AssertionError)


def skippable(model: PreTrainedModel) -> int:
    """How many layers lie below everything that is trained. Raises ``RecipeError`` where they cannot be skipped."""
    layers = layer_list(model)
    if layers is None:
        kind = model.config.model_type
        raise _refusal(f"cannot be used: {kind} models do not run through a single list of layers")
    depth, first = lowest_trained(model, layers)
    if depth == 0:
        raise _refusal(
            f"has nothing to skip: {first} is trained, and with it everything above changes",
            "remove it, or adapt upper layers only with lora.layers_to_transform",
        )
    if chance := chance_below(model, layers, depth):
        raise _refusal(
            f"cannot be used: {chance} makes the frozen layers' states random, and other ones in every epoch",
            "remove it, or set that dropout to 0 in the model's config.json",
        )
    return depth


def skipping(network: Network, states: States, examples: list[Example], batch_size: int, pad_id: int) -> Network:
    """The network that runs its frozen layers once a row. Raises ``RecipeError`` where that is not the same."""
    depth, layers = skippable(network.model), layer_list(network.model)
    assert layers is not None
    layout = replace(network.layout, share=0)  # states are kept whole rows at a time
    layout = replace(layout, looks_at=None) if depth == len(layers) else layout  # the last layer is skipped, too
    network = replace(network, layout=layout)

    def with_frozen(states: States, groups: list[list[Example]]) -> Network:
        return replace(network, frozen=FrozenLayers(layers, depth, states, groups, network.layout, pad_id))

    probes = sorted(examples, key=lambda example: len(example.input_ids))[:PROBES]
    reason = _why_not(network, with_frozen(MemoryStates(), [probes]), probes)
    if reason is not None:
        raise _refusal(f"cannot be used: {reason}")
    return with_frozen(states, groups_of(examples, batch_size))


def _why_not(plain: Network, cached: Network, probes: list[Example]) -> str | None:
    """What speaks against it on a few rows: something trained or random below, or states that go past the layers."""
    assert cached.frozen is not None
    model, kind = plain.model, plain.model.config.model_type
    device = next(model.parameters()).device
    reversed_rows = [replace(probe, input_ids=probe.input_ids[::-1].copy()) for probe in probes]
    batch, others = (collate(rows, cached.frozen.pad_id, plain.layout).to(device) for rows in (probes, reversed_rows))
    was_training = model.training
    try:
        model.train()
        once, again = (cached.frozen.arriving(batch, plain.base_output) for _ in range(2))
        if once.requires_grad:
            return (
                f"something that is trained in this {kind} model changes the states that enter its first trained layer"
            )
        if not torch.equal(once, again):
            return f"the frozen layers of this {kind} model give other states each time"
        model.eval()
        with torch.no_grad():
            expected = rows_of(plain.hidden(batch), batch, plain.layout)
            cached.hidden(batch)  # computes the states
            plain.hidden(others)  # whatever the lower layers left lying about is no longer this batch's
            found = rows_of(cached.hidden(batch), batch, plain.layout)
    except SOMETHING_ELSE:
        return f"the upper layers of {kind} models do not run without the lower ones"
    finally:
        model.train(was_training)
    if all(close(f, e, TOLERANCES[e.dtype]) for f, e in zip(found, expected, strict=True)):
        return None
    return f"the upper layers of {kind} models take more from the lower ones than the last hidden states"


def _refusal(message: str, cure: str = "remove it") -> RecipeError:
    return RecipeError([Mistake(KEY, message, cure)])
