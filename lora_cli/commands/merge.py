"""`lora merge`: fold an adapter into its base, and measure that the result is what was trained."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from lora_cli.adapters.backbone import is_backbone
from lora_cli.adapters.merging import Folding, Naming, merge_files, merge_model, with_partners
from lora_cli.adapters.quantized import Quantization
from lora_cli.adapters.targets import stacked_parameters
from lora_cli.adapters.tokens import make_room_for
from lora_cli.commands.adapter_folder import TOKENIZER_FILES, check_new, copy_files
from lora_cli.commands.agreement import Agreement
from lora_cli.commands.comparison import Comparison, compare_merged
from lora_cli.commands.fitted import FittedAdapter, check_fingerprint, check_not_quantized, fit_adapter
from lora_cli.device import memory_errors
from lora_cli.errors import StorageError, UsageError
from lora_cli.hub import weight_files
from lora_cli.models import load_model, quiet, read_config, read_tokenizer
from lora_cli.ops.packing import library
from lora_cli.storage import free_bytes, new_folder, write_json
from lora_cli.tensorfile import DTYPES
from lora_cli.weights import weight_entries

COPIED = ("generation_config.json",)


@dataclass(frozen=True)
class MergeReport:
    """``merge_report.json``."""

    adapter: str
    base: str
    output: str
    dtype: str  # of the merged floating tensors
    bytes: int
    rows: str | None  # where the compared rows come from; none: not compared
    agreement: Agreement | None  # of the merged model with base + adapter
    adapter_mean_kl: float | None  # what the adapter changes: base + adapter against the base alone
    limit_mean_kl: float | None
    within_limit: bool | None
    onto: str  # full: the base as it is stored; dequantized: what a run saw of it
    quantization: str | None  # of the base, while the adapter was trained
    trained_agreement: Agreement | None  # of a quantized run: of the merged model with quantized base + adapter
    other_way_agreement: Agreement | None  # and of what merges onto the other base, with that

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    onto: str = "full",
    rows: str | None = None,
    verify: bool = True,
    remote_code: bool = False,
) -> MergeReport:
    """Write base + adapter as a plain model folder; ``onto`` says onto which base, where a run quantized it.

    Raises ``UsageError`` for an adapter on the wrong base or a folder that exists, ``StorageError`` where the
    merged model differs from the trained one by more than the limit; then no folder is left.
    """
    # 1. what can be wrong before anything is written
    check_new(output)
    fitted = fit_adapter(adapter, base, remote_code=remote_code)
    check_not_quantized(fitted)
    check_fingerprint(fitted)
    quantization = _base_to_merge_onto(fitted, onto, verify=verify)
    wanted = getattr(torch, dtype) if dtype else None
    stored = wanted or _stored_dtype(fitted.base)
    _check_space(fitted.base, output, wanted)
    tokenizer_folder = tokenizer_folder_of(fitted)
    tokenizer = tokenizer_of(fitted, tokenizer_folder, remote_code) if verify else None
    # 2. merge, verify and publish: a kill before the last rename leaves no folder
    with new_folder(output) as folder:
        _merge(fitted, folder, stored, wanted, quantization, remote_code)
        _write_config(fitted, folder, wanted, tokenizer_folder)
        copy_files(TOKENIZER_FILES, tokenizer_folder, folder)
        copy_files(COPIED, fitted.base, folder)
        found = None
        if tokenizer is not None:
            found = compare_merged(
                fitted, folder, tokenizer, stored, rows, onto=quantization, dtype=wanted, remote_code=remote_code
            )
            _check_agreement(found)
        report = _report(fitted, folder, output, stored, onto, found)
        write_json(folder / "merge_report.json", report.to_dict())
    return report


def _merge(
    fitted: FittedAdapter,
    folder: Path,
    stored: torch.dtype,
    wanted: torch.dtype | None,
    onto: Quantization | None,
    remote_code: bool,
) -> None:
    """Tensor by tensor from file to file; with the whole model in memory where stacked experts were trained.

    Files hold each expert's matrices apart, under names that only transformers puts together and takes apart.
    """
    parts = with_partners(fitted.adapter, fitted.skeleton)
    if not stacked_parameters(fitted.skeleton).keys() & {*fitted.adapter.updates, *fitted.adapter.saved}:
        merge_files(fitted.base, folder, parts, _naming(fitted), fitted.transposed, wanted, onto)
        return
    with memory_errors("merge on a machine with more memory: stacked experts are merged in memory"), quiet():
        model, _ = load_model(fitted.base, fitted.config, fitted.task, stored, remote_code=remote_code)
        make_room_for(model, fitted.adapter.tokens)
        merge_model(model, Folding(parts, fitted.transposed, onto), stored, wanted)
        model.save_pretrained(folder)


def _base_to_merge_onto(fitted: FittedAdapter, onto: str, *, verify: bool) -> Quantization | None:
    """What the run saw of its base, if it is to be merged onto that."""
    quantization = fitted.quantization
    if onto == "dequantized" and is_backbone(fitted.base):
        raise UsageError(
            f"{fitted.base} is what the run saw of its base, to the bit: there is no other", "leave --onto out"
        )
    if onto == "dequantized" and quantization is None:
        raise UsageError(
            f"--onto dequantized is for adapters trained on a quantized base, and {fitted.folder} records none",
            "leave it out",
        )
    if quantization is not None and (verify or onto == "dequantized"):
        library()  # it is needed, and may not be there
    return quantization if onto == "dequantized" else None


def _stored_dtype(base: Path) -> torch.dtype:
    """The floating type of most of the base's bytes."""
    sizes = {torch.float32: 0}
    for entry in weight_entries(base):
        dtype = DTYPES.get(entry.dtype)
        if dtype is not None and dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + entry.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _check_space(base: Path, output: Path, wanted: torch.dtype | None) -> None:
    needed = sum(entry.end - entry.start or entry.num_bytes for entry in weight_entries(base))
    if wanted is not None:
        needed = int(needed * wanted.itemsize / _stored_dtype(base).itemsize)
    free = free_bytes(output)
    if needed > free:
        raise StorageError(
            f"the merged model needs {needed / 1e6:,.1f} MB at {output}, and {free / 1e6:,.1f} MB are free",
            "free some space, or name another folder with -o",
        )


def _naming(fitted: FittedAdapter) -> Naming:
    names = {name for name, _ in fitted.skeleton.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in fitted.skeleton.named_buffers()}
    return Naming(names, fitted.skeleton.base_model_prefix, keep_foreign=fitted.task == "causal_lm")


def tokenizer_folder_of(fitted: FittedAdapter) -> Path | None:
    """The adapter's tokenizer where it has one, else the base's."""
    for folder in (fitted.folder, fitted.base):
        if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
            return folder
    return None


def tokenizer_of(fitted: FittedAdapter, folder: Path | None, remote_code: bool) -> PreTrainedTokenizerFast:
    """For the rows to compare on."""
    if folder is None:
        raise UsageError(
            f"neither {fitted.folder} nor {fitted.base} holds a tokenizer to compare rows with",
            "put one beside the adapter, or type --no-verify",
        )
    return read_tokenizer(folder, remote_code=remote_code)


def _write_config(fitted: FittedAdapter, folder: Path, wanted: torch.dtype | None, tokenizer: Path | None) -> None:
    """The base's configuration; a classifier's says what its head is and which id is padding."""
    if fitted.task == "causal_lm" and wanted is None and fitted.vocabulary is None and not is_backbone(fitted.base):
        shutil.copyfile(fitted.base / "config.json", folder / "config.json")
        return
    config = read_config(fitted.base)
    if fitted.task == "sequence_classification":
        config = copy.deepcopy(fitted.config)  # the base is still to be loaded with the one that fits it
        config.architectures = [type(fitted.skeleton).__name__]
        if config.pad_token_id is None and tokenizer is not None:
            config.pad_token_id = read_tokenizer(tokenizer).pad_token_id
    if wanted is not None:
        config.dtype = wanted
    if fitted.vocabulary is not None:
        config.get_text_config().vocab_size = fitted.vocabulary
    if is_backbone(fitted.base):
        del config.quantization_config  # merged weights are dense
    with quiet():
        config.save_pretrained(folder)


def _report(
    fitted: FittedAdapter, folder: Path, output: Path, stored: torch.dtype, onto: str, found: Comparison | None
) -> MergeReport:
    return MergeReport(
        adapter=os.fspath(fitted.folder),
        base=os.fspath(fitted.base),
        output=os.fspath(output),
        dtype=str(stored).removeprefix("torch."),
        bytes=sum(path.stat().st_size for path in weight_files(folder)),
        rows=found.rows if found else None,
        agreement=found.agreement if found else None,
        adapter_mean_kl=found.adapter_mean_kl if found else None,
        limit_mean_kl=found.limit_mean_kl if found else None,
        within_limit=found.within_limit if found else None,
        onto=onto,
        quantization=fitted.provenance.quantization,
        trained_agreement=found.trained if found else None,
        other_way_agreement=found.other_way if found else None,
    )


def _check_agreement(found: Comparison) -> None:
    if found.within_limit:
        return
    if found.is_rounding:
        raise StorageError(
            f"rounding would change the model by {found.agreement.mean_kl:.2e} nats (mean KL), and the adapter itself "
            f"by only {found.adapter_mean_kl:.2e}: part of what was trained would be lost; nothing was written",
            "merge with --dtype float32",
        )
    raise StorageError(
        f"the merged model is not the trained one: mean KL {found.agreement.mean_kl:.2e} nats over "
        f"{found.agreement.positions} positions, limit {found.limit_mean_kl:.1e} (the adapter itself changes "
        f"{found.adapter_mean_kl:.2e}); nothing was written",
        "merge with --dtype float32; where it differs there too, this is a bug to report",
    )
