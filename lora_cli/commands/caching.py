"""What `training.cache_frozen_layers` will need, and the network that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lora_cli.data.encoding import Example
from lora_cli.device import available_bytes
from lora_cli.distributed import ALONE, World
from lora_cli.errors import Mistake, RecipeError
from lora_cli.fusion.layers import layer_list
from lora_cli.fusion.network import Network
from lora_cli.fusion.skipping import KEY, skippable, skipping
from lora_cli.fusion.states import DiskStates, MemoryStates, States
from lora_cli.recipe import Recipe
from lora_cli.recipe.schema import AUTO_ROWS
from lora_cli.storage import free_bytes


@dataclass(frozen=True)
class CachePlan:
    """Which layers are run once a row, and what their states take."""

    where: str  # memory or disk
    layers: int
    of: int
    bytes: int  # of all the processes that share what they are kept in
    copies: int = 1  # so many processes

    @property
    def bytes_in_memory(self) -> int:
        """Of each process."""
        return self.bytes // self.copies if self.where == "memory" else 0

    def __str__(self) -> str:
        layers = f"{self.layers} of {self.of} layers" if self.layers > 1 else f"1 of {self.of} layers"
        return f"the lower {layers} run once a row; what they give takes {self.bytes / 1e6:,.1f} MB ({self.where})"


def plan_cache(
    recipe: Recipe,
    model: PreTrainedModel,
    examples: list[Example],
    dtype: torch.dtype,
    device: torch.device,
    world: World = ALONE,
) -> CachePlan | None:
    """Raises ``RecipeError`` with the figures where the states do not fit. The model may be on the meta device.

    In the course of some epochs each process meets nearly every row, and keeps it for itself.
    """
    where = recipe.training.cache_frozen_layers
    if where == "none":
        return None
    layers = layer_list(model)
    assert layers is not None, "checked before"
    tokens = sum(len(row) for row in {example.input_ids.tobytes(): example.input_ids for example in examples}.values())
    size = tokens * int(model.config.get_text_config().hidden_size) * dtype.itemsize
    copies = world.local_size if where == "memory" else world.size
    size *= copies
    if where == "memory":
        weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize if device.type == "cpu" else 0
        weights *= copies
        free, beside = (available_bytes(torch.device("cpu")) or 0) - weights, " beside the model" if weights else ""
    else:
        free, beside = free_bytes(recipe.output_path), f" in {recipe.output_path}"
    if size > free:
        other = "disk" if where == "memory" else "memory"
        needs, has = size / 1e6, max(free, 0) / 1e6
        message = (
            f"does not fit: the states of {tokens:,} tokens take {needs:,.1f} MB, and {has:,.1f} MB of {where} are "
            f"free{beside}"
        )
        raise RecipeError([Mistake(KEY, message, f"try {other}, or none")])
    return CachePlan(where, skippable(model), len(layers), size, copies)


def cache_notes(plan: CachePlan | None, epochs: float, evaluates: bool) -> list[str]:
    if plan is None:
        return []
    useless = epochs <= 1 and not evaluates
    return [str(plan), *(["a single epoch visits no row twice: cache_frozen_layers brings nothing"] if useless else [])]


def cached(network: Network, recipe: Recipe, examples: list[Example], pad_id: int, folder: Path) -> Network:
    """The network as the recipe wants it: with its frozen layers run once a row, or as it is."""
    where = recipe.training.cache_frozen_layers
    if where == "none":
        return network
    states: States = MemoryStates() if where == "memory" else DiskStates(folder)
    size = recipe.training.per_device_train_batch_size
    return skipping(network, states, examples, size if isinstance(size, int) else AUTO_ROWS, pad_id)
