"""The output folder of a run: what is in it, whose it is, and what a finished run leaves there."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lora_cli.adapters.adapter import LowRank, single_updates
from lora_cli.adapters.configuration import peft_config
from lora_cli.adapters.files import read_adapter, rounded, save_adapter, trained_tensors
from lora_cli.adapters.spectrum import MOST_LOST, changes_nothing, rounding_loss
from lora_cli.commands.card import model_card
from lora_cli.commands.plan import Plan
from lora_cli.commands.provenance import Provenance
from lora_cli.commands.summary import Summary, versions
from lora_cli.errors import StorageError, UsageError
from lora_cli.models import quiet
from lora_cli.storage import new_folder, storage_errors, write_json, write_text

OURS = "resolved.yaml"  # tells a run's folder; a recipe.yaml may be anybody's
EARLIER = "earlier-"


@dataclass(frozen=True)
class OutputFolder:
    """Paths below ``output_dir``."""

    root: Path
    method: str

    @property
    def result(self) -> Path:
        """What people take away: an adapter, or a plain model folder for the baselines."""
        return self.root / ("adapter" if self.method == "lora" else "model")

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def base(self) -> Path:
        """The base of a run that began from a random model: without it the adapter would fit nothing."""
        return self.root / "base"

    @property
    def backbone(self) -> Path:
        """The quantized base of a LoftQ run: what training saw, to the bit."""
        return self.root / "backbone"

    def check_usable(self) -> None:
        """Raises ``UsageError`` for a path that is no folder, or a folder with somebody else's files.

        ``StorageError`` where nothing can be written: that should not come out after the rows were read.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"output_dir {self.root} is a file")
        existing = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise StorageError(f"cannot write {self.root}: {existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise StorageError(f"cannot write {self.root}: no permission to write in {existing}")
        if not self.root.is_dir():
            return
        entries = [entry.name for entry in self.root.iterdir() if not entry.name.startswith((".", EARLIER))]
        if entries and not (self.root / OURS).exists() and not self._set_aside_before():
            raise UsageError(
                f"output_dir {self.root} holds other files ({', '.join(sorted(entries)[:3])}) and no run of lora",
                "choose a folder that is empty or does not exist",
            )

    def set_aside(self) -> Path | None:
        """Move an earlier run into ``earlier-001`` and so on; nothing is deleted."""
        entries = [e for e in self.root.iterdir() if e.name != ".lock" and not e.name.startswith(EARLIER)]
        if not entries:
            return None
        numbers = [e.name.removeprefix(EARLIER) for e in self.root.glob(f"{EARLIER}*")]
        number = 1 + max((int(text) for text in numbers if text.isdigit()), default=0)
        target = self.root / f"{EARLIER}{number:03d}"
        entries.sort(key=lambda e: e.name == OURS)  # last: a kill on the way leaves a folder that is still ours
        with storage_errors(target):
            target.mkdir()
            for entry in entries:
                os.rename(entry, target / entry.name)
        return target

    def _set_aside_before(self) -> list[Path]:
        return list(self.root.glob(f"{EARLIER}*/{OURS}"))

    def read_summary(self) -> Summary | None:
        """None where there is none that can be read: then it is written again."""
        try:
            return Summary(**json.loads(self.summary.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write_recipe(self, plan: Plan) -> None:
        write_text(self.root / OURS, resolved_text(plan))
        write_text(self.root / "recipe.yaml", plan.loaded.text)


def resolved_text(plan: Plan) -> str:
    """The recipe with every default filled in; what is not a key stands in comments, so it stays a recipe."""
    values = plan.recipe.model_dump(exclude_none=True)
    if plan.recipe.training.max_grad_norm is None:
        values["training"]["max_grad_norm"] = None  # the one null that is not the default: do not clip
    if plan.recipe.training.global_batch_size is not None:
        del values["training"]["gradient_accumulation_steps"]  # only one of them may be named
    commit = plan.model.folder.commit if plan.model.folder else None
    if commit:
        values["model"]["revision"] = commit
    header = [f"# {name} {version}" for name, version in versions().items()]
    header.append(
        f"# dtype {str(plan.dtype).removeprefix('torch.')} on {plan.device.type}, base commit {commit or 'none'}"
    )
    return "\n".join(header) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def save_result(
    output: OutputFolder,
    plan: Plan,
    model: PreTrainedModel,
    config: dict[str, Any] | None,
    summary: Summary,
    base_fingerprint: str,
) -> None:
    """Write the adapter (or the model), the tokenizer and a model card, all at once; then the summary."""
    with new_folder(output.result, replace=True) as folder:
        if config is not None:
            tensors = trained_tensors(model)
            save_adapter(folder, tensors, config)
            updates = read_adapter(folder).updates
            check_trained(single_updates(updates))
            if (dtype := file_dtype(plan, updates)) != torch.float32:
                save_adapter(folder, rounded(tensors, dtype), config)
            _provenance(plan, base_fingerprint).write(folder)
        else:
            with quiet():
                model.save_pretrained(folder)
        save_tokenizer(folder, plan.tokenizer, plan.recipe.dataset.chat_template)
        write_text(
            folder / "README.md", model_card(plan, summary, config["base_model_name_or_path"] if config else None)
        )
    write_json(output.summary, summary.to_dict())


def check_trained(updates: dict[str, LowRank]) -> None:
    """Raises ``StorageError`` for an adapter that changes nothing after training: every update is still zero."""
    if updates and changes_nothing(updates):
        raise StorageError(
            "every update is zero after training: the adapter changes nothing, and was not written",
            "raise training.learning_rate; if it is not tiny, this is a bug to report",
        )


def file_dtype(plan: Plan, updates: dict[str, LowRank]) -> torch.dtype:
    """`training.save_dtype`; auto halves the file where the base is bfloat16 and the updates bear it.

    One that counts from a start is the small difference of two large products, and stays float32.
    """
    wanted = plan.recipe.training.save_dtype
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    if plan.dtype != torch.bfloat16 or rounding_loss(single_updates(updates), torch.bfloat16) > MOST_LOST:
        return torch.float32
    return torch.bfloat16


def _provenance(plan: Plan, base_fingerprint: str) -> Provenance:
    kind = plan.recipe.model.quantization
    if kind == "none":
        return Provenance(base_fingerprint, plan.labels)
    return Provenance(base_fingerprint, plan.labels, kind, str(plan.dtype).removeprefix("torch."))


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, chat_template: str | None) -> None:
    """The tokenizer as it was used: with the recipe's template, if it names one."""
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
    with quiet():
        tokenizer.save_pretrained(folder)


def adapter_config(plan: Plan, model: PreTrainedModel, base: str) -> dict[str, Any] | None:
    """PEFT's configuration of this run's adapter; none for the baselines."""
    if plan.recipe.method != "lora":
        return None
    commit = plan.model.folder.commit if plan.model.folder else None
    revision = None if plan.has_backbone else commit or plan.recipe.model.revision
    return peft_config(model, plan.recipe.lora, plan.recipe.task, plan.model.saved, base=base, revision=revision)
