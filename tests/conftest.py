"""Small models and tokenizers built in memory, and a way to run the command line in this process.

Nothing here needs a network. Tests on real material ask for the ``shared`` fixture and are skipped where it
is not there.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lora_cli.models import heed_soft_cap
from lora_cli.ops.products import products_as_before

torch.set_num_threads(1)  # tiny tensors: threads cost more than they bring, and runs repeat bit for bit


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, and say so, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Modules and tests live as long as the session: collecting garbage need not look through them each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _products_of_each_test() -> Iterator[None]:
    """Which library multiplies is a setting of the process: no test inherits another one's."""
    with products_as_before():
        yield


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the cat sees a dog and the dog sees a bird while one two three birds sing in a tree by the sea".split()  # noqa: SIM905
VOCABULARY = 320

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "llama": GROUPED | {"tie_word_embeddings": True},
    "mixtral": GROUPED | {"intermediate_size": 24, "num_local_experts": 3, "num_experts_per_tok": 2},
    "gemma2": GROUPED
    | {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "attn_logit_softcapping": 2.0,
        "max_position_embeddings": 256,
    },
    "modernbert": SMALL
    | {"hidden_size": 64, "global_attn_every_n_layers": 2, "local_attention": 16, "pad_token_id": 0},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "bert": SMALL,
    "roberta": SMALL | {"max_position_embeddings": 130, "type_vocab_size": 1, "pad_token_id": 0},
}
NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
AUTO = {"causal_lm": AutoModelForCausalLM, "sequence_classification": AutoModelForSequenceClassification}


def tiny_config(kind: str, **changes: Any) -> Any:
    """A configuration of a few thousand parameters, without dropout."""
    return AutoConfig.for_model(kind, **(TINY[kind] | NO_DROPOUT.get(kind, {}) | changes))


def tiny_model(kind: str, task: str = "causal_lm", seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, eval mode. Weights are larger than usual, so that differences show."""
    torch.manual_seed(seed)
    model = AUTO[task].from_config(tiny_config(kind, **changes))
    heed_soft_cap(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's tokens and template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML
    return fast


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """``model_folder(kind, task)``: a saved tiny model with its tokenizer; each made once."""
    made: dict[str, Path] = {}

    def make(kind: str = "llama", task: str = "causal_lm", **changes: Any) -> Path:
        key = json.dumps([kind, task, changes], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{kind}-{task}")
            tiny_model(kind, task, **changes).save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return make


def sentence(index: int, length: int) -> str:
    """Words chosen by index: the same text in every run, of any length."""
    return " ".join(WORDS[(index * 7 + position * (index % 5 + 1)) % len(WORDS)] for position in range(length))


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Dialogues of very different lengths."""
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(index, 3 + index % 7)},
                {"role": "assistant", "content": sentence(index + 1, 1 + (index * 5) % 23)},
            ]
        }
        for index in range(count)
    ]


def labelled_rows(count: int) -> list[dict[str, Any]]:
    return [{"text": sentence(index, 3 + index % 9), "label": index % 2} for index in range(count)]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_lora(*arguments: object) -> Result:
    """The command line in this process."""
    from typer.testing import CliRunner

    from lora_cli.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return Result(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def lora() -> Callable[..., Result]:
    """``lora("train", path, ...)`` runs the command line in this process."""
    return run_lora


@pytest.fixture
def recipe(tmp_path: Path, model_folder: Callable[..., Path]) -> Callable[..., Path]:
    """``recipe(**{"training.max_steps": 2})`` writes a small runnable recipe and returns its path."""
    import yaml

    def write(name: str = "recipe.yaml", rows: int = 24, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "model": {"path": str(model_folder("llama")), "dtype": "float32"},
            "dataset": {"path": str(write_jsonl(tmp_path / "rows.jsonl", chat_rows(rows))), "max_length": 64},
            "lora": {"r": 4},
            "training": {"max_steps": 4, "learning_rate": 0.01, "logging_steps": 1, "use_cpu": True},
            "output_dir": str(tmp_path / "run"),
        }
        for dotted, value in changes.items():
            section, _, key = dotted.rpartition(".")
            (values.setdefault(section, {}) if section else values)[key] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return write


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models, tokenizers and data sets beside the checkout; skipped where they are absent."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data")
    return SHARED
