"""Make everything the quickstart ships: the data, the tokenizer and the small pretrained model.

    python recipes/quickstart/make.py

It writes train.jsonl and heldout.jsonl (the new task), then a tokenizer and a base model into model/. The
base is pretrained by the tool itself, on rows that never show the new task; two CPU cores take about ten
minutes. Every step is seeded, so running it again gives the same files.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from language import BASE_TASKS, NEW_TASK, Row, Task, draw_row
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
MODEL = HERE / "model"

TRAIN_ROWS, HELDOUT_ROWS = 900, 200
PRETRAIN_ROWS, PRETRAIN_EVAL_ROWS = 160_000, 1_000
PAD, START, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MODEL_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.04,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": SPECIAL_TOKENS.index(END),
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
}
TRAINING = {
    "learning_rate": 0.003,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 64,
    "num_train_epochs": 1,
    "use_cpu": True,
}


def main() -> None:
    rows = list(unique_rows(Random(1), (NEW_TASK,), TRAIN_ROWS + HELDOUT_ROWS))
    write_rows(HERE / "train.jsonl", rows[:TRAIN_ROWS])
    write_rows(HERE / "heldout.jsonl", rows[TRAIN_ROWS:])
    pretraining = list(pretraining_rows(hidden={answer_of(row) for row in rows}))
    save_tokenizer(pretraining, MODEL)
    with tempfile.TemporaryDirectory() as folder:
        save_half_precision(pretrain(pretraining, Path(folder)), MODEL)


def unique_rows(chance: Random, tasks: tuple[Task, ...], count: int) -> Iterator[Row]:
    """Rows of which no two share an answer, so what is held out is new in question and answer."""
    answers: set[str] = set()
    while len(answers) < count:
        row = draw_row(chance, tasks)
        if answer_of(row) not in answers:
            answers.add(answer_of(row))
            yield row


def pretraining_rows(hidden: set[str]) -> Iterator[Row]:
    """Rows of the base's tasks, none of which shows a sentence that the new task will ask for."""
    chance, count = Random(2), 0
    while count < PRETRAIN_ROWS + PRETRAIN_EVAL_ROWS:
        row = draw_row(chance, BASE_TASKS)
        if not hidden & {sentence_of(row), answer_of(row)}:
            count += 1
            yield row


def sentence_of(row: Row) -> str:
    """`"Make it past: The cat sleeps."` is about *The cat sleeps.*"""
    return row["messages"][0]["content"].split(": ", maxsplit=1)[1]


def answer_of(row: Row) -> str:
    """What the assistant says."""
    return row["messages"][1]["content"]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_tokenizer(rows: Iterable[Row], folder: Path) -> None:
    """A byte-level BPE with the ChatML template, as a folder that transformers loads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL_CONFIG["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    messages = (message for row in rows for message in row["messages"])
    tokenizer.train_from_iterator((f"{said['role']}\n{said['content']}" for said in messages), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MODEL_CONFIG["max_position_embeddings"],
    ).save_pretrained(folder)


def pretrain(rows: list[Row], folder: Path) -> Path:
    """Train the base from random weights with the tool's own command; the folder of its result."""
    write_rows(folder / "pretrain.jsonl", rows[:PRETRAIN_ROWS])
    write_rows(folder / "pretrain_eval.jsonl", rows[PRETRAIN_ROWS:])
    recipe = {
        "task": "causal_lm",
        "method": "full",
        "model": {"config": MODEL_CONFIG, "tokenizer": str(MODEL), "dtype": "float32"},
        "dataset": {
            "path": str(folder / "pretrain.jsonl"),
            "eval_path": str(folder / "pretrain_eval.jsonl"),
            "max_length": 128,
        },
        "training": TRAINING,
        "output_dir": str(folder / "run"),
    }
    path = folder / "pretrain.yaml"
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")  # JSON is YAML too
    subprocess.run([sys.executable, "-m", "lora_cli", "train", str(path)], check=True)
    return folder / "run" / "model"


def save_half_precision(trained: Path, folder: Path) -> None:
    """The same weights in two bytes each, ready for `model: recipes/quickstart/model`."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, max_new_tokens=48
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
