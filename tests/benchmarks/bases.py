"""``python -m tests.benchmarks.bases SHAPE FOLDER``: a shape's weights and rows on disk, once for all contenders."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoConfig

from lora_cli.models import quiet
from tests.benchmarks.contenders.job import AUTO_CLASSES, ROWS_FILE
from tests.benchmarks.shapes import SHAPES, Shape


def save_base(shape: Shape, folder: Path) -> Path:
    settings = {key: value for key, value in shape.config.items() if key != "model_type"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape.config["model_type"], **settings)
    with quiet():
        auto = AUTO_CLASSES[shape.task]
        auto.from_config(config, dtype=getattr(torch, shape.dtype)).save_pretrained(folder)
    rows = [asdict(row) for row in shape.rows()]
    (folder / ROWS_FILE).write_text(json.dumps(rows), encoding="utf-8")
    return folder


if __name__ == "__main__":
    print(json.dumps(str(save_base(SHAPES[sys.argv[1]], Path(sys.argv[2])))))  # noqa: T201
