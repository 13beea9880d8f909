"""The ranks, scales and targets of an ``adapter_config.json``, as PEFT writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_cli.adapters.layer import scaling_of

# What a configuration says of an adapter beside its ranks, scales and targets.
KEPT = ("peft_type", "task_type", "base_model_name_or_path", "revision", "lora_dropout", "fan_in_fan_out")


def rank_keys(ranks: Mapping[str, int], scalings: Mapping[str, float], use_rslora: bool) -> dict[str, Any]:
    """``r`` and ``lora_alpha`` of most modules, and patterns for the others, so that every module gets its scale."""
    alphas = {name: alpha_of(scalings[name], rank, use_rslora) for name, rank in ranks.items()}
    r, alpha = usual(list(ranks.values())), usual(list(alphas.values()))
    optional = {
        "use_rslora": use_rslora,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != r},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
    }
    return {"r": r, "lora_alpha": alpha} | {key: value for key, value in optional.items() if value}


def alpha_of(scaling: float, rank: int, use_rslora: bool) -> float | int:
    """The alpha that gives this scale at this rank, without the noise of the last bits."""
    alpha = float(f"{scaling / scaling_of(1.0, rank, use_rslora):.12g}")
    return int(alpha) if math.isfinite(alpha) and alpha.is_integer() else alpha


def usual(values: list[Any]) -> Any:
    """The most frequent one, the first of them where several are: the others stand in a pattern."""
    return max(values, key=values.count)


def rewritten(
    like: Mapping[str, Any], ranks: Mapping[str, int], scalings: Mapping[str, float], *, saved: bool = False
) -> dict[str, Any]:
    """The configuration of an adapter made from another one: the same base and task, plain alpha / r.

    ``saved`` keeps ``modules_to_save``.
    """
    kept = {key: like[key] for key in KEPT if like.get(key) is not None}
    if saved and like.get("modules_to_save"):
        kept["modules_to_save"] = like["modules_to_save"]
    targets = {"target_modules": plain_targets(like, list(ranks)), "bias": "none", "inference_mode": True}
    return kept | targets | rank_keys(ranks, scalings, use_rslora=False)


def plain_targets(config: Mapping[str, Any], modules: list[str]) -> list[str]:
    """The adapter's own list where it is one and nothing narrows it; whole names, which choose exactly, elsewhere."""
    narrowed = any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    named = config.get("target_modules")
    if isinstance(named, list) and not narrowed and _covers(named, modules):
        return sorted(named)
    return sorted(modules)


def _covers(named: list[str], modules: list[str]) -> bool:
    """Whether every module is one of these, or ends in one."""
    return all(any(name == key or name.endswith(f".{key}") for key in named) for name in modules)
