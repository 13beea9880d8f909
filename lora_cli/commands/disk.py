"""The room on disk that a run will take."""

from __future__ import annotations

from lora_cli.adapters.targets import linear_targets
from lora_cli.commands.caching import CachePlan
from lora_cli.commands.trainable import Counted, ModelPlan
from lora_cli.recipe import Recipe


def backbone_bytes(model: ModelPlan, recipe: Recipe) -> int:
    """Of a LoftQ run's own base at most: packed layers with their scales, and all else in float32."""
    if not recipe.lora.is_loftq:
        return 0
    packed = sum(target.in_features * target.out_features for target in linear_targets(model.targets))
    rest = model.counted.total - model.counted.trainable - packed
    return packed * recipe.lora.loftq_config.loftq_bits // 8 + packed // 48 + 4 * rest + 4 * model.counted.trainable


def disk_bytes(counted: Counted, recipe: Recipe, cache: CachePlan | None = None, backbone: int = 0) -> int:
    """What the output folder will hold: checkpoints with two moments each, the final weights, a cache meanwhile."""
    weights = 4 * counted.trainable
    checkpoints = recipe.training.save_total_limit + 2  # the best one, and the one being written
    final = weights if recipe.method == "lora" else 4 * counted.total
    base = 4 * counted.total if recipe.model.config is not None else 0
    states = cache.bytes if cache is not None and cache.where == "disk" else 0
    return 3 * weights * checkpoints + final + base + backbone + states
