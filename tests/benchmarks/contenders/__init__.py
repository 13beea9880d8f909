"""Who is measured: this tool, and each peer that is installed.

A contender is a function that trains on a ``Job`` as its own documentation says, and tells the job each finished step.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tests.benchmarks.shapes import Shape


@dataclass(frozen=True)
class Contender:
    place: str  # module.function below this package, imported only where it runs
    modules: tuple[str, ...] = ()  # what has to be installed
    needs_cuda: bool = False
    tasks: tuple[str, ...] = ("causal_lm", "sequence_classification")
    needs_lengths: bool = False  # is nothing new where all rows are alike
    needs_variant: bool = False  # is nothing new where the shape is plain
    needs_prefix: bool = False  # is nothing new where rows have nothing in common
    needs_float32: bool = False  # is nothing new in other types
    needs_top: bool = False  # is nothing new where all layers are adapted

    def train(self) -> Any:
        module, _, function = self.place.rpartition(".")
        return getattr(import_module(f"{__name__}.{module}"), function)

    def why_not(self, shape: Shape, *, cuda: bool) -> str | None:
        """Why it cannot be measured here; None where it can."""
        if shape.task not in self.tasks:
            return "does not train this task"
        if self.needs_lengths and shape.shortest == shape.longest:
            return "the same: all rows have one length"
        if self.needs_variant and not shape.is_variant:
            return "the same: the shape is plain"
        if self.needs_prefix and not shape.prefix:
            return "the same: rows have nothing in common"
        if self.needs_top and shape.top is None:
            return "the same: all layers are adapted"
        if self.needs_float32 and (shape.dtype != "float32" or cuda):
            return "the same: products are not float32's on a CPU"
        if self.needs_cuda and not cuda:
            return "not measured: no CUDA device"
        needed = (*self.modules, *(["bitsandbytes"] if shape.quantization != "none" else []))
        if not all(find_spec(module) for module in needed):
            return "not installed"
        return None


TRAINER = ("peft", "accelerate")
CONTENDERS = {
    "lora": Contender("ours.train"),
    "plain lora": Contender("ours.train_plain", needs_variant=True),
    "peft+trainer": Contender("trainer.train", TRAINER),
    "peft+trainer+grouped": Contender("trainer.train_grouped", TRAINER, needs_lengths=True),
    "peft+trainer+liger": Contender(
        "trainer.train_liger", (*TRAINER, "liger_kernel"), needs_cuda=True, tasks=("causal_lm",)
    ),
    "trl": Contender("trl.train", ("peft", "trl"), tasks=("causal_lm",)),
    "unsloth": Contender("unsloth.train", ("unsloth", "trl"), needs_cuda=True, tasks=("causal_lm",)),
}
# One thing changed at a time: an idea of ours left out, or one added.
ABLATIONS = {
    "lora, nothing changed": Contender("changes.nothing"),
    "lora, element-wise work compiled": Contender("changes.compiled"),
    "lora, Liger's kernels": Contender("changes.by_liger", ("liger_kernel",), needs_cuda=True),
    "lora, rows padded": Contender("changes.padded"),
    "lora, last layer on every token": Contender("changes.whole"),
    "lora, all logits at once": Contender("changes.all_logits", tasks=("causal_lm",)),
    "lora, no fused forms": Contender("changes.unfused"),
    "lora, q, k, v and gate, up apart": Contender("changes.apart", tasks=("causal_lm",)),
    "lora, AdamW tensor by tensor": Contender("changes.loose"),
    "lora, backward pass through frozen layers": Contender("changes.through", needs_top=True),
    "lora, frozen layers cached in memory": Contender("changes.cached", needs_top=True),
    "lora, prefix in every row": Contender("changes.unshared", needs_prefix=True),
    "lora, float32 multiplied as torch does": Contender("changes.by_torch", needs_float32=True),
    "lora, freed memory given back": Contender("changes.giving_back"),
}
