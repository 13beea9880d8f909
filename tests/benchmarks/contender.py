"""One contender on one shape, in a process of its own: ``python -m tests.benchmarks.contender NAME SHAPE BASE``.

Prints one JSON object: tokens per second of real tokens (no padding counted) over the measured steps, and the
process's peak memory in bytes, with the base's own share.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks.shapes import SHAPES, Shape

RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(base: Path, shape: Shape) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, shape.dtype))


def ours(base: Path, shape: Shape, rows: list[list[int]]) -> list[float]:
    """The product's own loop."""
    from lora_cli.adapters.initialisation import initialise
    from lora_cli.adapters.injection import adapters_of, attach, find_targets, freeze_base
    from lora_cli.data.batches import StepPlan
    from lora_cli.data.encoding import Example
    from lora_cli.device import keep_freed_memory
    from lora_cli.fusion.proof import build_network
    from lora_cli.recipe import LoraSection, TrainingSection
    from lora_cli.tasks import CausalLM
    from lora_cli.training.loop import LoopSettings, train_steps
    from lora_cli.training.optimizer import FlatAdamW

    keep_freed_memory()
    model = load(base, shape)
    attach(model, find_targets(model, LoraSection(r=RANK, lora_alpha=ALPHA), []))
    freeze_base(model, [])
    initialise(adapters_of(model), True, 0)
    model.train()
    examples = [
        Example(np.asarray(row, dtype=np.int32), np.arange(len(row)) >= len(row) // 2, str(index))
        for index, row in enumerate(rows)
    ]
    plan = StepPlan(len(rows), shape.rows_per_step, 1, seed=0, shuffle=False)
    settings = LoopSettings(2e-4, "linear", 0, shape.steps + 1, 1.0, pad_id=0)
    network = build_network(model, "causal_lm")
    optimizer = FlatAdamW(model, TrainingSection())
    device = torch.device("cpu")
    return [
        step.seconds
        for step in train_steps(network, CausalLM, examples, plan, optimizer, settings, start=0, device=device)
    ]


def peft_trainer(base: Path, shape: Shape, rows: list[list[int]]) -> list[float]:
    """PEFT + transformers' Trainer, set up as its documentation does."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models
    from transformers import (
        DataCollatorForSeq2Seq,
        PreTrainedTokenizerFast,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.began = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)

    model = get_peft_model(
        load(base, shape), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>")
    data = [{"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]} for row in rows]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape.rows_per_step,
            max_steps=shape.steps + 1,
            learning_rate=2e-4,
            use_cpu=True,
            bf16=shape.dtype == "bfloat16",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
        Trainer(model, arguments, train_dataset=data, data_collator=collator, callbacks=[clock]).train()
    return clock.seconds


CONTENDERS = {"lora": ours, "peft+trainer": peft_trainer}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    name, shape, base = sys.argv[1], SHAPES[sys.argv[2]], Path(sys.argv[3])
    rows = json.loads((base / "rows.json").read_text(encoding="utf-8"))
    seconds = CONTENDERS[name](base, shape, rows)[1:]  # the first step warms up
    tokens = sum(len(row) for row in rows[shape.rows_per_step :])
    print(json.dumps({"tokens_per_second": tokens / sum(seconds), "peak_bytes": peak_bytes()}))  # noqa: T201


if __name__ == "__main__":
    main()
