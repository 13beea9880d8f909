"""The table of tasks and what the rest of the house says about it."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from lora_cli.data.formats import FORMATS_OF_TASK
from lora_cli.models import AUTO_CLASSES
from lora_cli.recipe.rules.facts import EVALUATION_METRICS
from lora_cli.recipe.schema import Task
from lora_cli.tasks import TASKS

SUMS = {
    "causal_lm": {name: torch.tensor(2) for name in ("loss", "targets", "correct", "rows", "exact")},
    "sequence_classification": {"loss": torch.tensor(2), "confusion": torch.tensor([[1, 0], [0, 1]])},
}


def test_every_table_knows_the_same_tasks():
    names = list(get_args(Task))
    assert list(TASKS) == list(SUMS) == list(EVALUATION_METRICS) == list(FORMATS_OF_TASK) == list(AUTO_CLASSES) == names


@pytest.mark.parametrize("task", TASKS)
def test_the_rules_know_the_figures_of_every_task(task: str):
    """A metric that may decide the best model must exist, and every one that exists may decide."""
    figures = TASKS[task].figures(SUMS[task])
    assert EVALUATION_METRICS[task] == tuple(f"eval_{name}" for name in figures)
    assert all(isinstance(value, float) for value in figures.values())


@pytest.mark.parametrize("task", TASKS)
def test_what_is_better_higher_is_a_figure(task: str):
    figures = set(TASKS[task].figures(SUMS[task]))
    assert TASKS[task].higher_is_better == figures - {"loss", "perplexity"}
