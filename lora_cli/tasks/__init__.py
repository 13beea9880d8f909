"""What an example is and what its loss is. One file a task, one line in ``TASKS``."""

from lora_cli.tasks.causal_lm import CausalLM
from lora_cli.tasks.classification import SequenceClassification
from lora_cli.tasks.task import Metrics, Sums, Task

TASKS: dict[str, type[Task]] = {
    "causal_lm": CausalLM,
    "sequence_classification": SequenceClassification,
}

__all__ = ["TASKS", "CausalLM", "Metrics", "SequenceClassification", "Sums", "Task"]
