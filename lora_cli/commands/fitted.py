"""An adapter folder together with the base it belongs to, checked to fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.adapter import Adapter, mismatches, targets_of
from lora_cli.adapters.backbone import is_backbone
from lora_cli.adapters.files import read_adapter
from lora_cli.adapters.injection import attach, freeze_base, packable_modules
from lora_cli.adapters.layer import Parametrisation
from lora_cli.adapters.quantized import Quantization
from lora_cli.adapters.targets import tied_partner
from lora_cli.adapters.tokens import attach_rows, make_room_for
from lora_cli.commands.provenance import NAME, Provenance, read_provenance
from lora_cli.errors import UsageError
from lora_cli.hub import model_folder
from lora_cli.models import empty_model, fingerprint, grown_vocabulary, read_config, set_labels
from lora_cli.ops.packing import FORMATS

MADE_WITH_IT = ("base", "backbone")  # folders of a run that its adapter is for


@dataclass(frozen=True)
class FittedAdapter:
    """An adapter, its base's folder, and the base's modules on the meta device."""

    folder: Path
    adapter: Adapter
    provenance: Provenance
    base: Path
    config: PreTrainedConfig
    skeleton: PreTrainedModel

    @property
    def task(self) -> str:
        return self.adapter.task

    @property
    def vocabulary(self) -> int | None:
        """How many words the base has with those of the adapter; None where the adapter brings none."""
        return grown_vocabulary(self.skeleton, self.config)

    @property
    def transposed(self) -> set[str]:
        """Modules and stacked parameters that are stored (in, out)."""
        modules = dict(self.skeleton.named_modules())
        stacks = [name for name, update in self.adapter.updates.items() if update.experts > 1]
        return {name for name, module in modules.items() if isinstance(module, Conv1D)} | {
            name for name in stacks if getattr(modules[name.rpartition(".")[0]], "is_transposed", False)
        }

    @property
    def quantization(self) -> Quantization | None:
        """How the base was stored while the adapter was trained; None for a dense one, and where nobody tells.

        Raises ``UsageError`` for a provenance that names what is not known here.
        """
        kind, dtype = self.provenance.quantization, self.provenance.quantized_from
        if kind is None or dtype is None:
            return None
        if kind not in FORMATS or dtype not in ("float32", "bfloat16", "float16"):
            raise UsageError(f"{self.folder / NAME} names a base quantized to {kind} from {dtype}: not known here")
        modules = packable_modules(self.skeleton, self.adapter.saved_modules)
        return Quantization(kind, getattr(torch, dtype), frozenset(modules))


def fit_adapter(
    folder: Path, base: str | None = None, *, weights: bool = True, remote_code: bool = False
) -> FittedAdapter:
    """Read an adapter and find its base.

    Raises ``UsageError`` where the base is not to be found, or has other modules or shapes.
    """
    adapter = read_adapter(folder)
    base_folder = find_base(folder, adapter, base, weights=weights, remote_code=remote_code)
    config = read_config(base_folder, remote_code=remote_code)
    provenance = read_provenance(folder)
    if adapter.task == "sequence_classification":
        set_labels(config, _labels(adapter, provenance, config))
    skeleton = empty_model(config, adapter.task, remote_code=remote_code)
    make_room_for(skeleton, adapter.tokens)
    fitted = FittedAdapter(folder, adapter, provenance, base_folder, config, skeleton)
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters(remove_duplicate=False)}
    wrong = mismatches(adapter, shapes, fitted.transposed)
    if wrong:
        shown = "\n".join(f"    {line}" for line in wrong[:10])
        more = f"\n    ... and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise UsageError(
            f"{folder} does not fit the base {base_folder}:\n{shown}{more}", "name the right base with --base"
        )
    _check_ties(fitted)
    return fitted


def check_fingerprint(fitted: FittedAdapter) -> None:
    """Raises ``UsageError`` for a base of the right shapes with other weights than the adapter was trained on."""
    recorded = fitted.provenance.base_fingerprint
    if recorded is not None and fingerprint(fitted.base) != recorded:
        raise UsageError(
            f"{fitted.base} is not the base that {fitted.folder} was trained on: it holds other weights",
            "name the right base with --base",
        )


def check_not_quantized(fitted: FittedAdapter) -> None:
    """Raises ``UsageError`` for a base whose stored numbers are not its weights."""
    settings = getattr(fitted.config, "quantization_config", None)
    if settings is not None and not is_backbone(fitted.base):
        method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        raise UsageError(
            f"{fitted.base} is stored quantized ({method}): its numbers are not the weights",
            "name the base that it was made from with --base",
        )


def _check_ties(fitted: FittedAdapter) -> None:
    """PEFT may train a copy of a module that shares its weight; in the base, both of them would change."""
    parts = dict.fromkeys(copies_in_full(fitted.skeleton, fitted.adapter), "in full")
    parts |= dict.fromkeys(copied_rows(fitted.skeleton, fitted.adapter), "in part")
    parts |= dict.fromkeys(adapted_tables(fitted.adapter), "adapted")
    for name, how in parts.items():
        if partner := tied_partner(fitted.skeleton, name):
            raise UsageError(
                f"{fitted.folder} was trained with {name} {how}, which shares its weight with {partner} "
                f"in {fitted.base}: this is not supported"
            )


def copies_in_full(model: PreTrainedModel, adapter: Adapter) -> list[str]:
    """Modules saved in full that share their weight with another one that was not saved with the same values."""
    alone = []
    for name in adapter.saved_modules:
        partner = tied_partner(model, name)
        one, other = (adapter.saved.get(f"{module}.weight") for module in (name, partner))
        if partner is not None and (one is None or other is None or not torch.equal(one, other)):
            alone.append(name)
    return alone


def copied_rows(model: PreTrainedModel, adapter: Adapter) -> list[str]:
    """Tables beside the input embedding with rows of their own; a head that is tied to it has the embedding's."""
    return [name for name in adapter.tokens if model.get_submodule(name) is not model.get_input_embeddings()]


def adapted_tables(adapter: Adapter) -> list[str]:
    """Embeddings with an update."""
    return [name for name, update in adapter.updates.items() if update.is_embedding]


def find_base(
    folder: Path,
    adapter: Adapter,
    base: str | None = None,
    *,
    weights: bool = True,
    remote_code: bool = False,
    download: bool = True,
) -> Path:
    """The base's folder. Raises ``UsageError`` where it is not named or not to be found."""
    name = base or adapter.base
    if not name:
        raise UsageError(f"{folder} does not say which base it belongs to", "name it with --base")
    revision = None if base else adapter.config.get("revision")
    beside = folder.resolve().parent / Path(name).name  # a base that was made with the adapter has moved with it
    if base is None and beside.name in MADE_WITH_IT and beside.is_dir() and not Path(name).is_dir():
        return beside
    try:
        return model_folder(name, revision, weights=weights, remote_code=remote_code, download=download).path
    except UsageError as error:
        raise UsageError(f"the adapter's base: {error.message}", "name its folder with --base") from error


def _labels(adapter: Adapter, provenance: Provenance, config: PreTrainedConfig) -> list[str]:
    """The names of the classes; their number from the head that the adapter holds."""
    if provenance.labels:
        return provenance.labels
    heads = [t for name, t in adapter.saved.items() if name.endswith("weight") and t.ndim == 2]
    count = min((t.shape[0] for t in heads), default=config.num_labels)
    names = [str(config.id2label.get(index, index)) for index in range(count)]
    return names if count == config.num_labels else [f"LABEL_{index}" for index in range(count)]


def attach_fitted(model: PreTrainedModel, fitted: FittedAdapter) -> None:
    """Put the adapter's layers on a model of its base; their values are still to be loaded."""
    make_room_for(model, fitted.adapter.tokens)
    attach(model, targets_of(fitted.adapter), Parametrisation(use_dora=fitted.adapter.use_dora))
    freeze_base(model, fitted.adapter.saved_modules)
    attach_rows(model, {name: table.ids for name, table in fitted.adapter.tokens.items()})
