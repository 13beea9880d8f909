"""A merged model, or an exported adapter, compared with what was trained: base + adapter, on real rows.

Of a run on a quantized base there are two bases: the full one and what the run saw of it. A merge is judged by the one
that it was made onto; how far it is from the trained model, and how far the other merge would be, is told besides.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from lora_cli.adapters.adapter import tensors_of
from lora_cli.adapters.files import load_trained
from lora_cli.adapters.injection import packable_modules, quantize
from lora_cli.adapters.merging import Folding, merge_model, with_partners
from lora_cli.adapters.quantized import Quantization
from lora_cli.adapters.tokens import make_room_for
from lora_cli.commands.agreement import LIMITS, Agreement, compare, compared_rows, limit_of, logits_of
from lora_cli.commands.fitted import FittedAdapter, attach_fitted
from lora_cli.commands.rows import position_limit, read_dataset
from lora_cli.data.encoding import Example
from lora_cli.data.rows import raise_bad_rows, read_rows
from lora_cli.device import memory_errors
from lora_cli.errors import DataError, LoraError, UsageError
from lora_cli.models import load_model, num_embeddings, read_config
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
    dtype: torch.dtype  # of the weights that were written
    trained: Agreement | None = None  # of a quantized run: the merged model with quantized base + adapter
    other_way: Agreement | None = None  # and what merges onto the other base, with that

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
    onto: Quantization | None = None,
    dtype: torch.dtype | None = None,
    remote_code: bool = False,
) -> Comparison:
    """Everything in float32, so that what differs is the rounding of the weights alone; one model at a time.

    ``onto`` is what the run saw of its base, where the merge was made onto that; ``dtype`` what all of the merged
    model was rounded to, if it was.
    """
    rows, source = rows_to_compare(fitted, tokenizer, path)
    rows = fitting_rows(rows, fitted)
    models = _Models(fitted, rows, remote_code)
    with memory_errors(MEMORY_CURE):
        base, expected = models.adapted(onto)
        found = models.written(merged)
        more = models.beside_quantized(onto, expected, found, stored, dtype)
    adapter_kl = compare(expected, base).mean_kl
    return Comparison(source, compare(expected, found), adapter_kl, limit_of(stored, adapter_kl), stored, *more)


def compare_exported(
    fitted: FittedAdapter,
    exported: FittedAdapter,
    tokenizer: PreTrainedTokenizerFast,
    stored: torch.dtype,
    path: str | None,
    *,
    remote_code: bool = False,
) -> Comparison:
    """Two adapters of one base, in float32, so that what differs is what was written."""
    rows, source = rows_to_compare(fitted, tokenizer, path)
    rows = fitting_rows(rows, fitted)
    with memory_errors("type --no-verify to export without loading the base"):
        base, trained = _Models(fitted, rows, remote_code).adapted(None)
        _, served = _Models(exported, rows, remote_code).adapted(None)
    adapter_kl = compare(trained, base).mean_kl
    return Comparison(source, compare(trained, served), adapter_kl, limit_of(stored, adapter_kl), stored)


@dataclass(frozen=True)
class _Models:
    """The logits of the models to compare; each is loaded, run and let go."""

    fitted: FittedAdapter
    rows: list[Example]
    remote_code: bool

    def _loaded(self, folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
        gc.collect()  # the one before
        return load_model(folder, config, self.fitted.task, torch.float32, remote_code=self.remote_code)[0]

    def _base(self) -> PreTrainedModel:
        model = self._loaded(self.fitted.base, self.fitted.config)
        make_room_for(model, self.fitted.adapter.tokens)
        return model

    def _logits(self, model: PreTrainedModel) -> Tensor:
        return logits_of(model, self.fitted.task, self.rows)

    def written(self, folder: Path) -> Tensor:
        return self._logits(self._loaded(folder, read_config(folder, remote_code=self.remote_code)))

    def adapted(self, quantization: Quantization | None) -> tuple[Tensor, Tensor]:
        """The logits of the base alone, full or quantized, and of it + adapter."""
        model = self._base()
        if quantization is not None:
            _quantize_from(model, self.fitted.adapter.saved_modules, quantization)
        base = self._logits(model)
        attach_fitted(model, self.fitted)
        load_trained(model, {name: tensor.float() for name, tensor in tensors_of(self.fitted.adapter).items()})
        return base, self._logits(model)

    def beside_quantized(
        self, onto: Quantization | None, expected: Tensor, found: Tensor, stored: torch.dtype, dtype: torch.dtype | None
    ) -> tuple[Agreement | None, Agreement | None]:
        """How far the merged model is from quantized base + adapter, and how far the other merge is."""
        quantization = self.fitted.quantization
        if quantization is None:
            return None, None
        trained = expected if onto is not None else self.adapted(quantization)[1]
        model = self._base()
        other = quantization if onto is None else None
        merge_model(
            model, Folding(with_partners(self.fitted.adapter, model), self.fitted.transposed, other), stored, dtype
        )
        return compare(trained, found), compare(trained, self._logits(model))


def _quantize_from(model: PreTrainedModel, saved: list[str], quantization: Quantization) -> None:
    """Pack a float32 model's layers as a run did whose base was of another type."""
    for name in quantization.modules:
        module = model.get_submodule(name)
        module.weight.data = module.weight.data.to(quantization.dtype)
    quantize(model, packable_modules(model, saved), quantization.kind)


def rows_to_compare(
    fitted: FittedAdapter, tokenizer: PreTrainedTokenizerFast, path: str | None
) -> tuple[list[Example], str]:
    """Rows to compare on: those asked for, else the run's own held-out rows, else a few sentences."""
    if path is not None:
        section = DatasetSection(path=[path])
        found = read_rows(section, [path], "train")
        if found.bad:
            raise_bad_rows(found.bad, len(found.rows) + len(found.bad), "mend them, or name other rows")
        return _plain_rows(tokenizer, [_texts(row.columns) for row in found.rows]), path
    recipe = fitted.folder.parent / "resolved.yaml"
    if recipe.is_file():
        try:
            dataset = read_dataset(load_recipe(recipe))
        except LoraError as error:  # the rows may have moved since; sentences serve as well
            why = error.message.splitlines()[0]
            return _plain_rows(tokenizer, list(SENTENCES)), f"built-in sentences (the run's own rows: {why})"
        else:
            return compared_rows(dataset.eval or dataset.train), "held-out rows" if dataset.eval else "training rows"
    return _plain_rows(tokenizer, list(SENTENCES)), "built-in sentences"


def fitting_rows(rows: list[Example], fitted: FittedAdapter) -> list[Example]:
    """The rows, cut to the positions that the model has. Raises ``UsageError`` for ids that it does not embed."""
    if not rows:
        raise DataError("none of the rows to compare on has a token", "name others with --rows")
    largest = max(int(row.input_ids.max()) for row in rows)
    embedded = num_embeddings(fitted.skeleton)
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
