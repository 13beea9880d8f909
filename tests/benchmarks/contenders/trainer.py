"""PEFT with transformers' Trainer, set up as their documentation does; also with rows grouped by length, and with
Liger's kernels.
"""

from __future__ import annotations

import tempfile
from dataclasses import fields
from typing import Any

from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from tests.benchmarks.contenders.job import Job
from tests.benchmarks.shapes import ALPHA, RANK, Row, Shape

PEFT_TASKS = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}


def train(job: Job, *, grouped: bool = False, **options: Any) -> None:
    from peft import get_peft_model, prepare_model_for_kbit_training

    if job.shape.quantization != "none":
        base = prepare_model_for_kbit_training(job.load_quantized(), use_gradient_checkpointing=False)
    else:
        base = job.load()
    model = get_peft_model(base, lora_config(job.shape))
    collators = {
        "causal_lm": DataCollatorForSeq2Seq(job.tokenizer(), padding=True, label_pad_token_id=-100),
        "sequence_classification": DataCollatorWithPadding(job.tokenizer()),
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, **arguments_of(job), **_order(grouped), **options)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[trainer_row(row) for row in job.rows],
            data_collator=collators[job.shape.task],
            callbacks=[Ticks(job)],
        )
        trainer.train()


def train_grouped(job: Job) -> None:
    train(job, grouped=True)


def train_liger(job: Job) -> None:
    train(job, use_liger_kernel=True)


def lora_config(shape: Shape) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(shape.targets),
        task_type=PEFT_TASKS[shape.task],
        use_dora=shape.use_dora,
        lora_dropout=shape.dropout,
        layers_to_transform=None if shape.top is None else shape.adapted_layers,
    )


def arguments_of(job: Job) -> dict[str, Any]:
    """What every user of Trainer's arguments is given here: an epoch is a pass, so each measures the same rows."""
    return {
        "per_device_train_batch_size": job.shape.rows_per_step,
        "num_train_epochs": job.epochs,
        "learning_rate": 2e-4,
        "use_cpu": not job.on_cuda,
        "bf16": job.shape.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _order(grouped: bool) -> dict[str, Any]:
    """Rows in their order, as ours; or grouped by length, which transformers 5 spells otherwise than 4."""
    if "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}:
        return {"train_sampling_strategy": "group_by_length" if grouped else "sequential"}
    return {"group_by_length": grouped}


def trainer_row(row: Row) -> dict[str, Any]:
    if row.label is not None:
        return {"input_ids": row.ids, "labels": row.label}
    return {"input_ids": row.ids, "labels": [-100] * row.prompt + row.ids[row.prompt :]}


class Ticks(TrainerCallback):
    def __init__(self, job: Job) -> None:
        self.job = job

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.job.tick()
