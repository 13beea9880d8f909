"""The models and rows that are measured. Nothing heavy is imported: the process that starts all others reads this."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

RANK, ALPHA = 16, 32
LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_PROJECTIONS = ("query", "key", "value", "dense")


@dataclass(frozen=True)
class Row:
    ids: list[int]
    label: int | None = None  # of a classifier's row
    prefix: int = 0  # tokens of it that all rows begin with

    @property
    def prompt(self) -> int:
        """Tokens that are not supervised: what all rows begin with, and half of the others."""
        return self.prefix + (len(self.ids) - self.prefix) // 2

    @property
    def num_targets(self) -> int:
        """Positions that the head is needed at."""
        return len(self.ids) - self.prompt if self.label is None else 1


@dataclass(frozen=True)
class Shape:
    """A random model and rows of random tokens.

    A pass is ``steps`` optimizer steps over the same rows in the same order. The first pass warms up: it has seen
    the longest step before the clock starts. Two are measured: memory still grows a little in the second one, and a
    run of thousands of steps is like the third.
    """

    title: str
    config: dict[str, Any]
    dtype: str
    rows_per_step: int
    shortest: int
    longest: int
    steps: int
    passes: int = 1  # measured, after one that is not
    usual: int | None = None  # the most frequent length; none: all lengths from shortest to longest alike
    task: str = "causal_lm"
    targets: tuple[str, ...] = LLAMA_PROJECTIONS
    needs_cuda: bool = False
    use_dora: bool = False
    quantization: str = "none"  # of the base
    dropout: float = 0.0  # of the adapters
    prefix: int = 0  # tokens that all rows begin with, beside their own: a system prompt
    top: int | None = None  # how many layers have adapters, from the last one down; none: all

    @property
    def adapted_layers(self) -> list[int]:
        layers: int = self.config["num_hidden_layers"]
        return list(range(0 if self.top is None else layers - self.top, layers))

    @property
    def is_variant(self) -> bool:
        """Whether there is a plainer form of it to compare with."""
        return self.use_dora or self.quantization != "none" or self.dropout > 0

    @property
    def plain(self) -> Shape:
        return replace(self, use_dora=False, quantization="none", dropout=0.0)

    def lengths(self) -> list[int]:
        """The same for every contender."""
        chance, count = random.Random(0), self.rows_per_step * self.steps
        if self.usual is None:
            return [chance.randint(self.shortest, self.longest) for _ in range(count)]
        return [round(chance.triangular(self.shortest, self.longest, self.usual)) for _ in range(count)]

    def rows(self) -> list[Row]:
        chance, words = random.Random(1), self.config["vocab_size"]
        ids = [[chance.randrange(10, words) for _ in range(length)] for length in self.lengths()]
        common = [random.Random(2).randrange(10, words) for _ in range(self.prefix)]
        ids = [common + row for row in ids]
        if self.task == "causal_lm":
            return [Row(row, prefix=self.prefix) for row in ids]
        return [Row(row, chance.randrange(2)) for row in ids]

    def step_rows(self) -> list[list[Row]]:
        """The rows of each step of a pass."""
        rows, size = self.rows(), self.rows_per_step
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    } | others


INSTRUCT_135M = llama(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True)
SMALL = llama(288, 768, 4, 9, 3, vocab_size=8192, tie_word_embeddings=True)
LLAMA_1B = llama(2048, 5632, 22, 32, 4)
LLAMA_8B = llama(4096, 14336, 32, 32, 8, vocab_size=128256)
LLAMA_70B = llama(8192, 28672, 80, 64, 8, vocab_size=128256, architectures=["LlamaForCausalLM"])
ENCODER = {
    "model_type": "bert",
    "vocab_size": 1024,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
}

MICRO = llama(32, 64, 2, 4, 2, vocab_size=128, tie_word_embeddings=True)

SHAPES = {
    "micro": Shape("the program itself; says nothing about speed", MICRO, "float32", 2, 8, 16, 2),
    "small-float32": Shape("Llama of 4 layers, float32; 4 rows of 64-512 tokens", SMALL, "float32", 4, 64, 512, 6),
    "instruct-135m-bfloat16": Shape(
        "Llama of 135M parameters, bfloat16; 4 rows of 64-512 tokens", INSTRUCT_135M, "bfloat16", 4, 64, 512, 4, 2
    ),
    "instruct-135m-float32": Shape(
        "Llama of 135M parameters, float32; 4 rows of 64-512 tokens", INSTRUCT_135M, "float32", 4, 64, 512, 4, 2
    ),
    "dora-135m-bfloat16": Shape(
        "Llama of 135M parameters with DoRA, bfloat16; 4 rows of 64-512 tokens",
        INSTRUCT_135M,
        "bfloat16",
        4,
        64,
        512,
        4,
        2,
        use_dora=True,
    ),
    "dropout-135m-bfloat16": Shape(
        "Llama of 135M parameters with lora_dropout 0.05, bfloat16; 4 rows of 64-512 tokens",
        INSTRUCT_135M,
        "bfloat16",
        4,
        64,
        512,
        4,
        2,
        dropout=0.05,
    ),
    "nf4-135m-bfloat16": Shape(
        "Llama of 135M parameters on an nf4 base, bfloat16; 4 rows of 64-512 tokens",
        INSTRUCT_135M,
        "bfloat16",
        4,
        64,
        512,
        4,
        2,
        quantization="nf4",
    ),
    "long-context": Shape(
        "Llama of 135M parameters, bfloat16; 4 rows of 2,048 tokens", INSTRUCT_135M, "bfloat16", 4, 2048, 2048, 1, 2
    ),
    "system-prompt": Shape(
        "Llama of 135M parameters, bfloat16; 8 rows of 32-256 tokens behind the same 256",
        INSTRUCT_135M,
        "bfloat16",
        8,
        32,
        256,
        2,
        2,
        prefix=256,
    ),
    "top-layers": Shape(
        "Llama of 135M parameters with adapters on its top 10 of 30 layers, bfloat16; 4 rows of 64-512 tokens",
        INSTRUCT_135M,
        "bfloat16",
        4,
        64,
        512,
        4,
        2,
        top=10,
    ),
    "encoder-sst2": Shape(
        "BERT of 11M parameters and 1,024 words, float32, classification; 32 rows of 5-60 tokens, as SST-2's",
        ENCODER,
        "float32",
        32,
        5,
        60,
        12,
        usual=15,
        task="sequence_classification",
        targets=BERT_PROJECTIONS,
    ),
    "llama-1.1b": Shape(
        "Llama of 1.1B parameters, bfloat16; 4 rows of 2,048 tokens",
        LLAMA_1B,
        "bfloat16",
        4,
        2048,
        2048,
        4,
        2,
        needs_cuda=True,
    ),
    "llama-8b": Shape(
        "Llama of 8B parameters, bfloat16; 1 row of 2,048 tokens",
        LLAMA_8B,
        "bfloat16",
        1,
        2048,
        2048,
        4,
        2,
        needs_cuda=True,
    ),
}


def unavailable() -> dict[str, str]:
    """What others measure and this version does not have, as its own recipe tells."""
    from lora_cli.recipe.schema import LoraSection, ModelSection

    features = {"DoRA": ("use_dora", LoraSection), "nf4 base": ("quantization", ModelSection)}
    return {
        name: "not available in this version"
        for name, (key, section) in features.items()
        if key not in section.model_fields
    }
