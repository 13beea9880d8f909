"""What a contender is given, and what it notes while it trains."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from lora_cli.device import choose_device
from tests.benchmarks.memory import process_peak_bytes, resident_bytes
from tests.benchmarks.shapes import Row, Shape

ROWS_FILE = "rows.json"
AUTO_CLASSES = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
}


@dataclass
class Job:
    """One contender's run over one shape: ``passes`` + 1 times over the same rows, in their order."""

    base: Path
    shape: Shape
    device: torch.device = field(default_factory=choose_device)
    ticks: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)  # processor time at each tick
    base_bytes: int = 0
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [Row(**row) for row in json.loads((self.base / ROWS_FILE).read_text(encoding="utf-8"))]

    @property
    def epochs(self) -> int:
        return self.shape.passes + 1

    def load(self) -> Any:
        """The base on the device, in the shape's dtype; the same for everyone who takes a model."""
        model = AUTO_CLASSES[self.shape.task].from_pretrained(self.base, dtype=getattr(torch, self.shape.dtype))
        model.to(self.device)
        self.loaded(model)
        return model

    def load_quantized(self) -> Any:
        """The same with its linear layers in nf4, as transformers and bitsandbytes have it."""
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, self.shape.dtype),
        )
        model = AUTO_CLASSES[self.shape.task].from_pretrained(
            self.base, dtype=getattr(torch, self.shape.dtype), quantization_config=settings, device_map=self.device
        )
        self.loaded(model)
        return model

    def loaded(self, model: Any) -> None:
        """Note what the base alone takes. Every weight is read once: a mapped file takes memory only then."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sum()
        self.base_bytes = torch.cuda.memory_allocated(self.device) if self.on_cuda else resident_bytes()

    def tick(self) -> None:
        """A step is finished, on the device too."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)
        self.ticks.append(time.perf_counter())
        self.worked.append(time.process_time())

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Of no words: peers want one to pad with. Its two ids lie in every vocabulary."""
        from tokenizers import Tokenizer, models

        words = {"<pad>": 0, "<eos>": 1}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
        )

    def figures(self) -> dict[str, Any]:
        """From the end of the first pass to the end of the last: all that lies between is part of the price."""
        steps, expected = self.shape.steps, self.shape.steps * self.epochs
        assert len(self.ticks) == expected, f"{len(self.ticks)} steps instead of {expected}"
        seconds = self.ticks[-1] - self.ticks[steps - 1]
        tokens = self.shape.passes * sum(len(row.ids) for row in self.rows)
        peak = torch.cuda.max_memory_allocated(self.device) if self.on_cuda else process_peak_bytes()
        peak = max(peak, self.base_bytes)  # the system's own two counts may differ by some pages
        return {
            "tokens_per_second": tokens / seconds,
            "busy_cores": (self.worked[-1] - self.worked[steps - 1])
            / seconds,  # fewer than there are: others were at work
            "step_seconds": seconds / (self.shape.passes * steps),
            "peak_bytes": peak,
            "above_base_bytes": peak - self.base_bytes,
        }
