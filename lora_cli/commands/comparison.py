"""A merged model compared with what was trained: base + adapter, on real rows."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lora_cli.adapters.files import load_trained, tensors_of
from lora_cli.adapters.tokens import make_room_for
from lora_cli.commands.agreement import LIMITS, Agreement, compare, compared_rows, limit_of, logits_of
from lora_cli.commands.fitted import FittedAdapter, attach_fitted
from lora_cli.commands.plan import make_plan, position_limit
from lora_cli.data.encoding import Example
from lora_cli.data.rows import read_rows
from lora_cli.device import memory_errors
from lora_cli.errors import DataError, LoraError, UsageError
from lora_cli.models import load_model, read_config
from lora_cli.recipe import DatasetSection, load_recipe

MEMORY_CURE = "type --no-verify to merge without loading both models"
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Once upon a time there was a little girl who lived near a great forest.",
    "Water boils at one hundred degrees, and freezes at zero.",
    "What is the sum of seven and twelve? It is nineteen.",
)


@dataclass(frozen=True)
class Comparison:
    """What was compared, what was found, and what would have been too much."""

    rows: str
    agreement: Agreement
    adapter_mean_kl: float
    limit_mean_kl: float
    dtype: torch.dtype  # of the merged weights

    @property
    def within_limit(self) -> bool:
        return self.agreement.within(self.limit_mean_kl)

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is no more than rounding to this type may cost, though the adapter does little."""
        return self.agreement.within(LIMITS.get(self.dtype, LIMITS[torch.bfloat16]))


def compare_merged(
    fitted: FittedAdapter,
    merged: Path,
    tokenizer: PreTrainedTokenizerFast,
    stored: torch.dtype,
    path: str | None,
    *,
    remote_code: bool = False,
) -> Comparison:
    """Everything in float32, so that what differs is the rounding of the weights alone; one model at a time."""
    rows, source = rows_to_compare(fitted, tokenizer, path)
    rows = _fitting(rows, fitted)
    with memory_errors(MEMORY_CURE):
        base, trained = _reference_logits(fitted, rows, remote_code)
        gc.collect()
        config = read_config(merged, remote_code=remote_code)
        model, _ = load_model(merged, config, fitted.task, torch.float32, remote_code=remote_code)
        agreement = compare(trained, logits_of(model, fitted.task, rows))
    adapter_kl = compare(trained, base).mean_kl
    return Comparison(source, agreement, adapter_kl, limit_of(stored, adapter_kl), stored)


def _reference_logits(fitted: FittedAdapter, rows: list[Example], remote_code: bool) -> tuple[Tensor, Tensor]:
    """The logits of the base alone, and of base + adapter."""
    model, _ = load_model(fitted.base, fitted.config, fitted.task, torch.float32, remote_code=remote_code)
    make_room_for(model, fitted.adapter.tokens)
    base = logits_of(model, fitted.task, rows)
    attach_fitted(model, fitted)
    load_trained(model, {name: tensor.float() for name, tensor in tensors_of(fitted.adapter).items()})
    return base, logits_of(model, fitted.task, rows)


def rows_to_compare(
    fitted: FittedAdapter, tokenizer: PreTrainedTokenizerFast, path: str | None
) -> tuple[list[Example], str]:
    """Rows to compare on: those asked for, else the run's own held-out rows, else a few sentences."""
    if path is not None:
        section = DatasetSection(path=[path])
        texts = [_texts(row.columns) for row in read_rows(section, [path], "train").rows]
        return _plain_rows(tokenizer, texts), path
    recipe = fitted.folder.parent / "resolved.yaml"
    if recipe.is_file():
        try:
            dataset = make_plan(load_recipe(recipe)).dataset
        except LoraError as error:  # the rows may have moved since; sentences serve as well
            why = error.message.splitlines()[0]
            return _plain_rows(tokenizer, list(SENTENCES)), f"built-in sentences (the run's own rows: {why})"
        else:
            return compared_rows(dataset.eval or dataset.train), "held-out rows" if dataset.eval else "training rows"
    return _plain_rows(tokenizer, list(SENTENCES)), "built-in sentences"


def _fitting(rows: list[Example], fitted: FittedAdapter) -> list[Example]:
    """The rows, cut to the positions that the model has. Raises ``UsageError`` for ids that it does not embed."""
    if not rows:
        raise DataError("none of the rows to compare on has a token", "name others with --rows")
    largest = max(int(row.input_ids.max()) for row in rows)
    embedded = getattr(fitted.skeleton.get_input_embeddings(), "num_embeddings", largest + 1)
    if largest >= embedded:
        raise UsageError(
            f"the tokenizer gives id {largest}, and the model embeds ids below {embedded} only",
            "put the model's own tokenizer beside the adapter, or type --no-verify",
        )
    limit = position_limit(fitted.skeleton)
    return [Example(row.input_ids[:limit], row.supervised[:limit], row.where, row.label) for row in rows]


def _texts(columns: dict[str, Any]) -> str:
    return "\n".join(value for value in columns.values() if isinstance(value, str)) or str(columns)


def _plain_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Example]:
    rows = []
    for text in texts:
        ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
        rows.append(Example(ids, np.zeros(len(ids), dtype=bool), "text", label=0))
    return compared_rows([row for row in rows if len(row.input_ids)])
