"""The rows on which a merged model is compared with what was trained."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from lora_cli.commands.agreement import compared_rows
from lora_cli.commands.fitted import FittedAdapter
from lora_cli.commands.plan import make_plan
from lora_cli.data.encoding import Example
from lora_cli.data.rows import read_rows
from lora_cli.errors import LoraError
from lora_cli.recipe import DatasetSection, load_recipe

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Once upon a time there was a little girl who lived near a great forest.",
    "Water boils at one hundred degrees, and freezes at zero.",
    "What is the sum of seven and twelve? It is nineteen.",
)


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


def _texts(columns: dict[str, Any]) -> str:
    return "\n".join(value for value in columns.values() if isinstance(value, str)) or str(columns)


def _plain_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Example]:
    rows = []
    for text in texts:
        ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
        rows.append(Example(ids, np.zeros(len(ids), dtype=bool), "text", label=0))
    return compared_rows([row for row in rows if len(row.input_ids)])
