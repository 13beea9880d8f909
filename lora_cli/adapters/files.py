"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Tensor names (PEFT 0.20): ``base_model.model.<module>.lora_A.weight`` (R, I), ``.lora_B.weight`` (O, R); of an
embedding ``.lora_embedding_A`` (R, V), ``.lora_embedding_B`` (D, R); the
parameters of modules trained in full under ``base_model.model.<parameter>``; single trained rows of a table (T, D)
under ``base_model.model.<module>.token_adapter.trainable_tokens_delta``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_cli.adapters.adapter import Adapter, LowRank, tensors_of
from lora_cli.adapters.configuration import TASK_TYPES
from lora_cli.adapters.embedding import FACTORS as EMBEDDING_FACTORS
from lora_cli.adapters.injection import adapters_of, tied_copies, trained_parameters
from lora_cli.adapters.layer import FACTORS, MAGNITUDE, scaling_of
from lora_cli.adapters.naming import file_name_of, trained_name_of
from lora_cli.adapters.patterns import matches
from lora_cli.adapters.tokens import ROWS, TokenRows, named_rows, rows_agree
from lora_cli.errors import StorageError, UsageError
from lora_cli.storage import write_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What was trained, on the CPU, under the names the base model gives it.

    Adapters appear as ``<module>.lora_A`` and so on, with all that their update is.
    """
    tensors: dict[str, Tensor] = {}
    layers = adapters_of(model)
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer.trained().items()}
    tensors |= {name: p for name, p in trained_parameters(model).items() if name.rpartition(".")[0] not in layers}
    found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return found | {copy: found[name].clone() for copy, name in tied_copies(model).items()}


def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put ``trained_tensors`` back, bit for bit. The names must be those of the model."""
    parameters = trained_parameters(model)
    expected = {**parameters, **tied_copies(model)}
    if expected.keys() != tensors.keys():
        raise StorageError(f"the saved weights are not this model's: {', '.join(_differences(expected, tensors))}")
    layers = adapters_of(model)
    for name, layer in layers.items():
        layer.load({part: tensors[f"{name}.{part}"] for part in layer.trained()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.rpartition(".")[0] not in layers:
                parameter.copy_(tensors[name])


def _differences(expected: Any, found: Any) -> list[str]:
    missing = [f"{name} is missing" for name in expected if name not in found]
    return [*missing, *(f"{name} is unexpected" for name in found if name not in expected)]


def save_adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write both files into an existing folder, and look at what was written.

    Raises ``StorageError`` where the file does not hold what it should, or no number of it is finite.
    """
    stacked = config.get("target_parameters") or []
    by_file_name = {file_name_of(name, stacked): tensor for name, tensor in tensors.items()}
    save_file(by_file_name, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, dict(sorted(config.items())))
    found = tensors_of(read_adapter(folder))
    if wrong := _differences(tensors, found):
        raise StorageError(f"{folder / WEIGHTS} was not written as it should be: {', '.join(wrong[:4])}")
    for name, tensor in tensors.items():
        if found[name].shape != tensor.shape or not torch.isfinite(found[name]).all():
            raise StorageError(f"{folder / WEIGHTS} was not written as it should be: {name} is damaged")


def rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an adapter in the type of its file.

    DoRA's magnitudes and single rows of tables stay float32: what they learn is a small change of a large number,
    which bfloat16 would lose.
    """
    whole = (MAGNITUDE, ROWS)
    return {name: tensor if name.endswith(whole) else tensor.to(dtype) for name, tensor in tensors.items()}


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter, ours or PEFT's.

    Raises ``UsageError`` for a folder that is none, holds pickles, or uses a variant that is not known here;
    ``StorageError`` for a damaged file.
    """
    config = read_adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").exists():
            raise UsageError(
                f"{folder} holds a pickled adapter (adapter_model.bin)",
                "a pickle can run code when it is read: load it in PEFT and save it again as safetensors",
            )
        raise UsageError(f"{folder} holds no {WEIGHTS}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{folder / WEIGHTS} is damaged: {error}") from error
    stacked = config.get("target_parameters") or []
    return _assemble(folder, config, {trained_name_of(name, stacked): tensor for name, tensor in tensors.items()})


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The checked ``adapter_config.json``; see ``read_adapter``."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    if not path.is_file():
        nested = folder / "adapter"
        help = f"did you mean {nested}?" if (nested / CONFIG).is_file() else None
        raise UsageError(f"{folder} holds no {CONFIG}", help)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UsageError(f"{path} does not describe a LoRA adapter")
    _refuse_variants(path, config)
    _check_values(path, config)
    return config


# Variants of PEFT whose tensors mean something else than W + s B A on the base as it is, and tasks without a base here.
_REFUSED = {
    "lora_bias": lambda value: bool(value),
    "bias": lambda value: value not in (None, "none"),
    "layer_replication": lambda value: bool(value),
    "alora_invocation_tokens": lambda value: bool(value),
    "use_qalora": lambda value: bool(value),
    "use_bdlora": lambda value: bool(value),
    "arrow_config": lambda value: bool(value),
    "kasa_config": lambda value: bool(value),
    "task_type": lambda value: value not in (None, *TASK_TYPES.values()),
    # these change the base's weights before training, so the file belongs to another base than it names
    "init_lora_weights": lambda value: str(value).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
}


# Keys of PEFT 0.21 that are understood above, or say nothing of what the tensors mean.
_KNOWN = {
    *_REFUSED,
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *(
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
    ),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "ensure_weight_tying", "runtime_config", "_custom_modules"),
    "trainable_token_indices",
}
_TYPES: dict[str, tuple[type, ...]] = {
    "lora_alpha": (int, float),
    "base_model_name_or_path": (str, type(None)),
    "alpha_pattern": (dict, type(None)),
    "use_rslora": (bool, type(None)),
    "modules_to_save": (list, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
}


def _check_values(path: Path, config: dict[str, Any]) -> None:
    """Values that are read here must have the type that PEFT writes; unknown keys must say nothing."""
    wrong = [
        f"{key}: {config[key]!r}"
        for key, kinds in _TYPES.items()
        if key in config and not isinstance(config[key], kinds)
    ]
    unknown = [f"{key}: {value!r}" for key, value in config.items() if key not in _KNOWN and value]
    if wrong or unknown:
        raise UsageError(f"{path} holds what is not understood: {', '.join([*wrong, *unknown])}")


def _refuse_variants(path: Path, config: dict[str, Any]) -> None:
    used = [f"{key}: {config[key]}" for key, refuse in _REFUSED.items() if key in config and refuse(config[key])]
    if used:
        raise UsageError(f"{path} uses what is not supported yet: {', '.join(used)}")


def _assemble(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    adapter = Adapter(config)
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind in (*FACTORS, MAGNITUDE):
            pairs.setdefault(module, {})[kind] = tensor
        elif kind in EMBEDDING_FACTORS:
            embeddings.add(module)
            pairs.setdefault(module, {})[kind.replace("embedding_", "")] = tensor
        elif kind == ROWS:
            adapter.tokens[module] = TokenRows(named_rows(config.get("trainable_token_indices"), module), tensor)
        elif "lora_" in kind or "lora_" in module.rpartition(".")[2]:
            known = "only LoRA and DoRA of linear layers, and LoRA of embeddings, are supported"
            raise UsageError(f"{folder / WEIGHTS} holds {name}: {known}")
        else:
            adapter.saved[name] = tensor
    for module in embeddings:  # PEFT saves a copy of the frozen table with it
        adapter.saved.pop(f"{module}.base_layer.weight", None)
    for module, pair in pairs.items():
        if module in embeddings and MAGNITUDE in pair:
            raise UsageError(f"{folder} adapts the embedding {module} with DoRA, which is not supported")
        if not _is_pair(pair):
            raise StorageError(f"{folder / WEIGHTS}: the tensors of {module} do not fit together")
        if module not in embeddings and bool(config.get("use_dora")) != (MAGNITUDE in pair):
            raise StorageError(f"{folder}: use_dora in {CONFIG} does not agree with the tensors of {module}")
        experts = _experts(config, module, pair["lora_A"])
        scaling = scaling_in(config, module, pair["lora_A"].shape[0] // experts)
        adapter.updates[module] = LowRank(
            pair["lora_A"], pair["lora_B"], scaling, pair.get(MAGNITUDE), experts, module in embeddings
        )
    if not rows_agree(config.get("trainable_token_indices"), adapter.tokens):
        raise StorageError(f"{folder}: trainable_token_indices in {CONFIG} does not agree with the rows in {WEIGHTS}")
    if not (adapter.updates or adapter.saved or adapter.tokens):
        raise StorageError(f"{folder / WEIGHTS} holds no adapter")
    return adapter


def _is_pair(pair: dict[str, Tensor]) -> bool:
    """A (R, I), B (O, R), and magnitudes (O,) or none."""
    if not pair.keys() >= set(FACTORS) or any(pair[part].ndim != 2 for part in FACTORS):
        return False
    magnitude = pair.get(MAGNITUDE)
    fits = magnitude is None or magnitude.shape == pair["lora_B"].shape[:1]
    return fits and pair["lora_A"].shape[0] == pair["lora_B"].shape[1]


def _experts(config: dict[str, Any], module: str, lora_A: Tensor) -> int:
    """Of a stacked parameter, whose A holds r rows an expert; 1 of a plain layer."""
    if not any(matches(module, pattern) for pattern in config.get("target_parameters") or []):
        return 1
    return int(lora_A.shape[0] // int(config["r"]))


def scaling_in(config: dict[str, Any], module: str, rank: int) -> float:
    """A module's scale by PEFT's rule: the first pattern that matches its whole name or an ending of it wins."""
    patterns = config.get("alpha_pattern") or {}
    try:
        named = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
        alpha = float(next(named, config.get("lora_alpha", 8)))
    except (re.error, TypeError, ValueError) as error:
        raise UsageError(f"{CONFIG}: alpha_pattern is not understood: {error}") from error
    return scaling_of(alpha, rank, bool(config.get("use_rslora")))
