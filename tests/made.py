"""Adapters on disk for tests: ours and PEFT's, with values in A and B so that they change the logits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lora_cli.adapters.adapter import tensors_of
from lora_cli.adapters.backbone import is_backbone
from lora_cli.adapters.configuration import TASK_TYPES, peft_config
from lora_cli.adapters.files import load_trained, save_adapter, trained_tensors
from lora_cli.adapters.initialisation import initialise
from lora_cli.adapters.injection import adapters_of, attach, freeze_base, packable_modules, parametrisation, quantize
from lora_cli.adapters.quantized import quantized
from lora_cli.adapters.targets import find_saved, find_targets
from lora_cli.adapters.tokens import attach_rows, find_rows
from lora_cli.commands.fitted import attach_fitted, fit_adapter
from lora_cli.commands.provenance import Provenance
from lora_cli.models import fingerprint, head_modules, load_model, read_config
from lora_cli.recipe import LoraSection
from lora_cli.seeds import stream
from tests.conftest import AUTO

IDS = torch.tensor([[5, 9, 17, 40, 101, 300, 7, 250, 33], [8, 2, 299, 14, 77, 6, 120, 55, 31]])
CLASSIFIERS = ("bert", "roberta")


def task_of(kind: str) -> str:
    return "sequence_classification" if kind in CLASSIFIERS else "causal_lm"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def distance(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Move every trained parameter away from where it began."""
    generator = stream(seed, "perturb")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def base_model(base: Path, task: str, dtype: torch.dtype = torch.float32) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AUTO[task].from_pretrained(base, dtype=dtype).eval()


def our_adapter(base: Path, folder: Path, task: str, **lora: Any) -> nn.Module:
    """Adapt, perturb and save as `lora train` does. Returns the adapted model."""
    model, _ = load_model(base, read_config(base), task, torch.float32)
    section = LoraSection(**{"r": 4} | lora)
    saved = [*head_modules(model, task), *find_saved(model, section.modules_to_save or [])]
    rows = find_rows(model, section.trainable_token_indices, saved)
    attach(model, find_targets(model, section, saved), parametrisation(section))
    freeze_base(model, saved)
    attach_rows(model, rows)
    initialise(adapters_of(model), section, seed=0)
    perturb(model)
    folder.mkdir(parents=True)
    config = peft_config(model, section, task, saved, base=str(base), revision=None)
    save_adapter(folder, trained_tensors(model), config)
    Provenance(fingerprint(base)).write(folder)
    return model.eval()


def peft_adapter(base: Path, folder: Path, task: str, **config: Any) -> nn.Module:
    """The same by PEFT."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "task_type": TASK_TYPES[task], "target_modules": "all-linear"} | config
    model = peft.get_peft_model(base_model(base, task), peft.LoraConfig(**settings))
    perturb(model)
    model.save_pretrained(str(folder))
    return model.eval()


def loaded_by_peft(base: Path, folder: Path, task: str) -> nn.Module:
    return peft.PeftModel.from_pretrained(base_model(base, task), str(folder)).eval()


def loaded_by_us(folder: Path, base: str | None = None, *, dense: bool = False) -> nn.Module:
    """The trained model: the base, packed where its provenance says so (of a float32 run), and the adapter.

    ``dense``: the full base and the adapter.
    """
    fitted = fit_adapter(folder, base)
    model, _ = load_model(fitted.base, fitted.config, fitted.task, torch.float32)
    if fitted.provenance.quantization is not None and not dense:
        quantize(model, packable_modules(model, fitted.adapter.saved_modules), fitted.provenance.quantization)
    attach_fitted(model, fitted)
    load_trained(model, tensors_of(fitted.adapter))
    return model.eval()


def seen_in_training(adapter: Path, folder: Path) -> Path:
    """The base as a run computed with it, as a plain dense model: itself, or what was packed, unpacked."""
    fitted = fit_adapter(adapter)
    if fitted.provenance.quantization is None and not is_backbone(fitted.base):
        return fitted.base
    model, _ = load_model(fitted.base, fitted.config, fitted.task, torch.float32)
    for name in fitted.quantization.modules if fitted.quantization else ():
        layer = model.get_submodule(name)
        packed = quantized(layer, fitted.provenance.quantization)
        weight_OI = packed.unpack(packed.weight, torch.float32)
        layer.weight.data = weight_OI.T.contiguous() if packed.transposed else weight_OI
    model.save_pretrained(folder)
    return folder


def other_weights(base: Path, folder: Path, task: str) -> Path:
    """A base with the same names and shapes, and other values."""
    model = base_model(base, task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    model.save_pretrained(folder)
    assert fingerprint(folder) != fingerprint(base)
    return folder
