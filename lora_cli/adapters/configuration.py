"""The ranks, scales and targets of an ``adapter_config.json``, as PEFT writes them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_cli.adapters.experts import LoRAStack
from lora_cli.adapters.injection import Adapted, adapters_of, tied_copies
from lora_cli.adapters.layer import is_transposed, scaling_of
from lora_cli.adapters.patterns import matches, shortest_list
from lora_cli.adapters.targets import linear_modules, outermost, stacked_parameters
from lora_cli.adapters.tokens import token_indices
from lora_cli.recipe import LoraSection

TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}

# What a configuration says of an adapter beside its ranks, scales and targets.
KEPT = ("peft_type", "task_type", "base_model_name_or_path", "revision", "lora_dropout", "fan_in_fan_out")


def peft_config(
    model: PreTrainedModel,
    lora: LoraSection,
    task: str,
    saved: list[str],
    *,
    base: str | None,
    revision: str | None,
) -> dict[str, Any]:
    """The ``adapter_config.json`` of a model with adapters: PEFT's keys, and only those that say something."""
    layers = adapters_of(model)
    ranks = {name: layer.file_rank for name, layer in layers.items()}
    scalings = {name: layer.scaling for name, layer in layers.items()}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": TASK_TYPES[task],
        "base_model_name_or_path": base,
        "revision": revision,
        "lora_dropout": lora.lora_dropout,
        "target_modules": _target_list(model, {name for name, layer in layers.items() if not is_stack(layer)}, saved),
        "bias": "none",
        "inference_mode": True,
    }
    optional = {
        "modules_to_save": [name for name in outermost(saved) if f"{name}.weight" not in tied_copies(model)],
        "ensure_weight_tying": bool(tied_copies(model)),
        "trainable_token_indices": token_indices(model),
        "use_dora": any(layer.lora_magnitude_vector is not None for layer in layers.values()),
        "fan_in_fan_out": any(is_transposed(getattr(layer, "base", None)) for layer in layers.values()),
        "target_parameters": _parameter_list(model, layers),
    }
    stacks = [name for name, layer in layers.items() if is_stack(layer)]
    stated = {key: value for key, value in optional.items() if value}
    return config | rank_keys(ranks, scalings, lora.use_rslora, stacks) | stated


def is_stack(layer: nn.Module) -> bool:
    return isinstance(layer, LoRAStack)


def _parameter_list(model: nn.Module, layers: dict[str, Adapted]) -> list[str]:
    """The shortest endings (`experts.down_proj`) that mean exactly the adapted stacked parameters."""
    chosen = {name for name, layer in layers.items() if is_stack(layer)}
    known = {name.replace(".base.", ".") for name in stacked_parameters(model)}
    endings = {".".join(name.split(".")[-2:]) for name in chosen}
    meant = {name for name in known if any(matches(name, ending) for ending in endings)}
    return sorted(endings) if meant == chosen else sorted(chosen)


def _target_list(model: PreTrainedModel, chosen: set[str], saved: list[str]) -> list[str]:
    others = [*chosen, *(name.removesuffix(".base") for name in linear_modules(model, outside=saved))]
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    return shortest_list(chosen, {*others, *head})


def rank_keys(
    ranks: Mapping[str, int], scalings: Mapping[str, float], use_rslora: bool, stacks: Collection[str] = ()
) -> dict[str, Any]:
    """``r`` and ``lora_alpha`` of most modules, and patterns for the others, so that every module gets its scale.

    Stacked parameters have no pattern: where there are some, the keys are theirs.
    """
    alphas = {name: alpha_of(scalings[name], rank, use_rslora) for name, rank in ranks.items()}
    leading = stacks or ranks
    r, alpha = usual([ranks[name] for name in leading]), usual([alphas[name] for name in leading])
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
