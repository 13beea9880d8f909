"""The base of a LoftQ run: a model's folder whose adapted layers are stored packed.

Beside the weights lie the adapter that the run begins with (`loftq_init`, as in the folders that LoftQ's authors
publish) and what each layer lost (`loftq.json`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.adapters.injection import let_go_of_files
from lora_cli.adapters.loftq import KINDS, Decomposed, decompose
from lora_cli.adapters.merging import Naming
from lora_cli.adapters.quantized import QuantizedLinear
from lora_cli.adapters.targets import Target, is_below, linear_targets
from lora_cli.errors import StorageError, UsageError
from lora_cli.hub import weight_files
from lora_cli.recipe import LoftQSection
from lora_cli.storage import write_json
from lora_cli.tensorfile import DTYPES, Entry, write_tensors
from lora_cli.weights import Form, WeightFile, packed_metadata, packed_weights, weight_entries

START, REPORT = "loftq_init", "loftq.json"
SETTINGS = "quantization_config"  # in a model's config.json, for transformers


@dataclass(frozen=True)
class LoftQReport:
    """What quantizing cost: errors by module, Frobenius norms over that of the weight."""

    bits: int
    iterations: int
    errors: dict[str, dict[str, float]]  # module -> plain (quantized alone), loftq (with its factors)

    @property
    def plain(self) -> float:
        return median(error["plain"] for error in self.errors.values())

    @property
    def loftq(self) -> float:
        return median(error["loftq"] for error in self.errors.values())

    @property
    def figures(self) -> dict[str, float]:
        worst = max(self.kept, default=1.0)
        return {
            "bits": self.bits,
            "iterations": self.iterations,
            "plain_error": self.plain,
            "error": self.loftq,
            "largest_share_of_plain": worst,
        }

    @property
    def kept(self) -> list[float]:
        """What is left of plain quantization's error, module by module."""
        return [error["loftq"] / error["plain"] for error in self.errors.values() if error["plain"]]


def read_report(folder: Path) -> LoftQReport | None:
    """None for a folder that is no backbone."""
    try:
        return LoftQReport(**json.loads((folder / REPORT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{folder / REPORT} cannot be read") from error


@dataclass
class BackboneWriter:
    """Quantizes the weights of ``targets`` on the way from a base's files to a backbone's, one at a time."""

    targets: list[Target]
    transposed: set[str]
    prefix: str  # base_model_prefix of the model
    config: LoftQSection
    device: torch.device
    tell: Callable[[int, int], None] = lambda done, total: None
    factors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    _waiting: dict[str, Tensor] = field(default_factory=dict)  # of the weight at hand: what is still to be written

    def __post_init__(self) -> None:
        self.targets = linear_targets(self.targets)  # a table stays as it is
        self._by_parameter = {f"{target.name}.weight": target for target in self.targets}
        self._naming = Naming(set(self._by_parameter), self.prefix, keep_foreign=True)

    def write(self, base: Path, folder: Path) -> None:
        """Raises ``UsageError`` where the base's files lack a weight, or hold one in a type that is no float."""
        self._check(base)
        for path in weight_files(base):
            self._write_file(WeightFile(path), folder / path.name)
        index = base / "model.safetensors.index.json"
        if index.is_file():
            self._write_index(folder, [path.name for path in weight_files(base)], index.name)
        write_json(folder / REPORT, asdict(LoftQReport(self.config.loftq_bits, self.config.loftq_iter, self.errors)))

    @property
    def kind(self) -> str:
        return KINDS[self.config.loftq_bits]

    def _check(self, base: Path) -> None:
        held = {self._target(entry.name): entry for entry in weight_entries(base)}
        if absent := [target.name for target in self.targets if target not in held]:
            raise UsageError(f"the base's files hold no weight for {', '.join(absent[:4])}")
        for target, entry in held.items():
            if target is not None and not getattr(DTYPES.get(entry.dtype), "is_floating_point", False):
                raise UsageError(f"{base}: {entry.name} is stored as {entry.dtype}, which cannot be quantized")

    def _target(self, key: str) -> Target | None:
        parameter = self._naming.parameter(key)
        return None if parameter is None else self._by_parameter[parameter]

    def _write_file(self, source: WeightFile, path: Path) -> None:
        targets = {entry.name: self._target(entry.name) for entry in source.entries}
        forms = {e.name: self._form(target, e) for e in source.entries if (target := targets[e.name]) is not None}
        entries: list[Entry] = []
        for entry in source.entries:
            entries += forms[entry.name].entries(entry.name) if entry.name in forms else [entry]

        def produce(entry: Entry) -> Tensor:
            if entry.name in forms:
                self._waiting = self._quantize(entry.name, forms[entry.name], source.tensor(entry.name))
            return self._waiting.pop(entry.name) if entry.name in self._waiting else source.tensor(entry.name)

        write_tensors(path, entries, produce, packed_metadata(forms))

    def _form(self, target: Target, entry: Entry) -> Form:
        transposed = target.name in self.transposed
        return Form(self.kind, target.out_features, target.in_features, DTYPES[entry.dtype], transposed)

    def _quantize(self, key: str, form: Form, weight: Tensor) -> dict[str, Tensor]:
        target = self._target(key)
        assert target is not None
        weight_OI = (weight.T if form.transposed else weight).to(self.device)
        found = decompose(weight_OI, self.kind, target.r, target.scaling, self.config.loftq_iter)
        self._note(target, found)
        return form.tensors(key, found.packed)

    def _note(self, target: Target, found: Decomposed) -> None:
        self.factors[f"{target.name}.lora_A"] = found.lora_A.cpu().contiguous()
        self.factors[f"{target.name}.lora_B"] = found.lora_B.cpu().contiguous()
        self.errors[target.name] = {"plain": found.plain_error, "loftq": found.error}
        self.tell(len(self.errors), len(self.targets))

    def _write_index(self, folder: Path, files: list[str], name: str) -> None:
        held = {file: WeightFile(folder / file).names for file in files}
        weight_map = {key: file for file, names in held.items() for key in names}
        total = sum((folder / file).stat().st_size for file in files)
        write_json(folder / name, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def settings_for_transformers(kind: str, dtype: torch.dtype, left_dense: list[str]) -> dict[str, Any]:
    """``quantization_config``: what lets transformers and bitsandbytes read a backbone of 4 or 8 bits.

    Of 2 and 3 bits there is no reader but this tool; transformers warns of the method, and fails at the shapes.
    """
    if kind in ("nf2", "nf3"):
        return {"quant_method": f"loftq_{kind}"}
    common = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": left_dense}
    if kind == "int8":
        return common | {"load_in_8bit": True}
    return common | {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
    }


def is_backbone(folder: Path) -> bool:
    return (folder / REPORT).is_file()


def pack_as_stored(model: PreTrainedModel, folder: Path, outside: list[str]) -> None:
    """Put a backbone's packed layers in the place of the dense ones, bit for bit; on meta, of their sizes.

    Those below ``outside`` stay dense: they are trained in full.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    naming = Naming(names, model.base_model_prefix, keep_foreign=True)
    for parameter, packed in packed_weights(folder, naming.parameter).items():
        name = parameter.removesuffix(".weight")
        if is_below(name, outside):
            continue
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, QuantizedLinear(layer, packed.to(layer.weight.device)))
    let_go_of_files(model)
