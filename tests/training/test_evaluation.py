"""Metrics over held-out rows: naive figures, whatever the batch, and a model left as it was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lora_cli.data.encoding import Example
from lora_cli.errors import OutOfMemoryError
from lora_cli.fusion.network import Network
from lora_cli.tasks import CausalLM, SequenceClassification
from lora_cli.training.evaluation import evaluate
from tests.conftest import tiny_model

LENGTHS = [(60, 5), (4, 3), (31, 30), (9, 1), (18, 2), (2, 1), (47, 20)]


def example(index: int, length: int, prompt: int, label: int | None = None) -> Example:
    ids = np.random.default_rng(index).integers(3, 320, length).astype(np.int32)
    return Example(ids, (np.arange(length) >= prompt) & (label is None), f"row {index}", label)


ROWS = [example(index, *lengths) for index, lengths in enumerate(LENGTHS)]
LABELLED = [example(index, length, 0, label=index % 2) for index, (length, _) in enumerate(LENGTHS)]


def figures(model: Any, rows: list[Example], task: Any = CausalLM, size: int = 3, **options: Any) -> Any:
    return evaluate(Network(model), task, rows, batch_size=size, pad_id=0, device=torch.device("cpu"), **options)


@torch.no_grad()
def naive(model: Any) -> dict[str, float]:
    """Row by row in float64, without padding."""
    loss, correct, exact = 0.0, 0, 0
    for row in ROWS:
        ids = torch.from_numpy(row.input_ids).long()
        log_p = model.double()(input_ids=ids[None]).logits[0].log_softmax(-1)
        targets = [t for t in range(1, len(ids)) if row.supervised[t]]
        hits = [int(log_p[t - 1].argmax()) == int(ids[t]) for t in targets]
        loss -= sum(float(log_p[t - 1, ids[t]]) for t in targets)
        correct, exact = correct + sum(hits), exact + all(hits)
    count = sum(row.num_targets for row in ROWS)
    return {
        "loss": loss / count,
        "perplexity": math.exp(loss / count),
        "token_accuracy": correct / count,
        "exact_match": exact / len(ROWS),
    }


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_the_figures_are_the_naive_ones_in_any_batch_size(size):
    assert figures(tiny_model("llama"), ROWS, size=size) == pytest.approx(naive(tiny_model("llama")), rel=1e-6)


def test_a_classifiers_figures_do_not_depend_on_the_batch_size():
    model = tiny_model("bert", "sequence_classification")
    alone = figures(model, LABELLED, SequenceClassification, size=1)
    assert figures(model, LABELLED, SequenceClassification, size=4) == pytest.approx(alone, rel=1e-6)
    assert set(alone) == {"loss", "accuracy", "macro_f1", "matthews_correlation"}


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_during_an_evaluation_and_the_mode_is_put_back(training):
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train(training)
    assert figures(model, ROWS) == figures(model, ROWS)
    assert model.training is training
    assert all(module.training is training for module in model.modules())


def test_an_evaluation_draws_no_random_number_and_leaves_no_gradient():
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    before = torch.get_rng_state()
    figures(model, ROWS)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_every_row_once():
    seen: list[int] = []
    figures(tiny_model("llama"), ROWS, size=3, progress=seen.append)
    assert seen == [3, 3, 1]


def test_a_request_to_stop_ends_it_before_the_next_batch_without_figures():
    model, seen = tiny_model("llama").train(), []
    assert figures(model, ROWS, size=1, progress=seen.append, stop=lambda: len(seen) == 2) is None
    assert seen == [1, 1]
    assert model.training


def test_memory_that_runs_out_names_the_evaluation_batch():
    class Greedy(CausalLM):
        @staticmethod
        def sums(model, batch):
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    model = tiny_model("llama").train()
    with pytest.raises(OutOfMemoryError, match="out of memory: CUDA out of memory") as caught:
        figures(model, ROWS, Greedy)
    assert "per_device_eval_batch_size" in str(caught.value)
    assert model.training
