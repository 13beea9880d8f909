"""The models and rows that are measured."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A random Llama and rows of random tokens; half of each row is supervised."""

    config: dict[str, Any]
    dtype: str
    rows_per_step: int
    shortest: int
    longest: int
    steps: int  # measured, after one that is not

    def lengths(self) -> list[int]:
        """The same lengths for every contender: uniform from shortest to longest."""
        chance = random.Random(0)
        return [chance.randint(self.shortest, self.longest) for _ in range(self.rows_per_step * (self.steps + 1))]


INSTRUCT_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SMALL = INSTRUCT_135M | {"num_hidden_layers": 4, "hidden_size": 288, "intermediate_size": 768, "vocab_size": 8192}

SHAPES = {
    "small-float32": Shape(SMALL, "float32", 4, 64, 512, 6),
    "instruct-135m-bfloat16": Shape(INSTRUCT_135M, "bfloat16", 4, 64, 512, 3),
    "instruct-135m-float32": Shape(INSTRUCT_135M, "float32", 4, 64, 512, 3),
}


def rows(shape: Shape) -> list[list[int]]:
    chance = random.Random(1)
    return [[chance.randrange(10, shape.config["vocab_size"]) for _ in range(length)] for length in shape.lengths()]


def save_base(shape: Shape, folder: Path) -> Path:
    """The base's weights on disk, once for all contenders."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_cli.models import quiet

    settings = {key: value for key, value in shape.config.items() if key != "model_type"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.config["model_type"], **settings)
    with quiet():
        AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype)).save_pretrained(folder)
    (folder / "rows.json").write_text(json.dumps(rows(shape)), encoding="utf-8")
    return folder
