"""Unsloth's model under TRL's SFTTrainer, as its notebooks do."""

from __future__ import annotations

import torch
from unsloth import FastLanguageModel  # before transformers and trl: it patches them

from tests.benchmarks.contenders.job import Job
from tests.benchmarks.contenders.trl import train_model
from tests.benchmarks.shapes import ALPHA, RANK


def train(job: Job) -> None:
    job.tokenizer().save_pretrained(job.base)  # it insists on finding one beside the weights
    model, _ = FastLanguageModel.from_pretrained(
        str(job.base), max_seq_length=job.shape.longest, dtype=getattr(torch, job.shape.dtype), load_in_4bit=False
    )
    job.loaded(model)
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=job.shape.dropout,
        bias="none",
        target_modules=list(job.shape.targets),
        layers_to_transform=None if job.shape.top is None else job.shape.adapted_layers,
        use_gradient_checkpointing=False,
    )
    train_model(job, model, None)
