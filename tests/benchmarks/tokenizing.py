"""``python -m tests.benchmarks.tokenizing FILE``: chat rows to tokens and masks, in a process of its own.

The tokenizer is the quickstart's. The product reads the file, renders each dialogue, finds the assistant's words in it,
tokenizes, masks, and verifies each mask by decoding it; beside it, the tokenizer alone on the rendered texts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from lora_cli.data.dataset import build_dataset, read_train
from lora_cli.data.encoding import TextEncoder
from lora_cli.models import read_tokenizer
from lora_cli.recipe import DatasetSection
from tests.benchmarks.processes import ROOT

MODEL = ROOT / "recipes" / "quickstart" / "model"


def measure_tokenizing(path: Path) -> dict[str, float]:
    tokenizer = read_tokenizer(MODEL)
    section = DatasetSection(path=[str(path)], max_length=2048)
    began = time.perf_counter()
    encoder = TextEncoder(section, tokenizer)
    encode = lambda content, where: list(encoder.examples(content, where))  # noqa: E731
    dataset = build_dataset(section, encode, read_train(section, "causal_lm"), None, seed=0)
    ours = time.perf_counter() - began
    messages = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [encoder.template.render(dialogue) for dialogue in messages]
    began = time.perf_counter()
    for text in texts:
        tokenizer(text, add_special_tokens=False)
    alone = time.perf_counter() - began
    count = len(dataset.train)
    return {
        "rows_per_second": count / ours,
        "tokens_per_second": dataset.train_counts.tokens / ours,
        "tokenizer_alone_rows_per_second": count / alone,
    }


if __name__ == "__main__":
    print(json.dumps(measure_tokenizing(Path(sys.argv[1]))))  # noqa: T201
