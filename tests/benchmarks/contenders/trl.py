"""TRL's SFTTrainer with PEFT. Its defaults hold, but for gradient checkpointing: nobody here recomputes."""

from __future__ import annotations

import tempfile
from typing import Any

from tests.benchmarks.contenders.job import Job
from tests.benchmarks.contenders.trainer import Ticks, arguments_of, lora_config, trainer_row


def train(job: Job) -> None:
    model = job.load() if job.shape.quantization == "none" else job.load_quantized()
    train_model(job, model, lora_config(job.shape))


def train_model(job: Job, model: Any, peft_config: Any) -> None:
    """SFTTrainer on rows that are tokenized already; a model that has its adapters comes without ``peft_config``."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(output_dir=folder, max_length=None, **arguments_of(job)),
            train_dataset=Dataset.from_list([trainer_row(row) for row in job.rows]),
            processing_class=job.tokenizer(),
            peft_config=peft_config,
            callbacks=[Ticks(job)],
        )
        trainer.train()
