"""Loss and metrics of labelled rows, against closed forms and rows alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_cli
from lora_cli.data.batches import collate, evaluation_batches
from lora_cli.data.encoding import Example
from lora_cli.fusion.network import Network
from lora_cli.tasks import SequenceClassification
from lora_cli.tasks.classification import macro_f1, matthews_correlation
from tests.conftest import VOCABULARY, tiny_model

TASK = "sequence_classification"
PAD = 3


def draw(count: int, classes: int = 2, holds_pad: bool = True, seed: int = 0) -> list[Example]:
    """Rows of 1 to 20 tokens; some hold the pad id, also as their last token."""
    generator = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        ids = generator.integers(4, VOCABULARY, int(generator.integers(1, 21))).astype(np.int32)
        if holds_pad and index % 2:
            ids[[0, len(ids) // 2, -1]] = PAD
        examples.append(Example(ids, np.zeros(len(ids), dtype=bool), "x", label=int(generator.integers(classes))))
    return examples


def alone(model: Any, example: Example) -> torch.Tensor:
    """The class logits of one row, read where a person would: a decoder's at the last token."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    with torch.no_grad():
        if hasattr(model, "score"):
            return model.score(model.base_model(ids).last_hidden_state[0, -1])
        return model(ids).logits[0]


def evaluate(model: Any, examples: list[Example], size: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    total: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for batch in evaluation_batches(examples, size, PAD):
            for name, value in SequenceClassification.sums(Network(model), batch).items():
                total[name] = total[name] + value if name in total else value
    return total, SequenceClassification.figures(total)


# --- logits


@pytest.mark.parametrize("pad_token_id", [None, PAD, 0])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_decoder_is_read_at_each_rows_last_token(kind: str, pad_token_id: int | None):
    """Whatever its configuration takes for padding, and also where the text holds that token."""
    model = tiny_model(kind, TASK, num_labels=3, pad_token_id=pad_token_id)
    examples = draw(8, 3)
    with torch.no_grad():
        logits_BC = Network(model).class_logits(collate(examples, PAD))
    expected_BC = torch.stack([alone(model, example) for example in examples])
    assert torch.allclose(logits_BC, expected_BC, rtol=0, atol=1e-5)


def test_the_models_own_forward_would_read_another_token():
    """The negative control for the test above: the reason why the head is not left to transformers."""
    model, examples = tiny_model("llama", TASK, pad_token_id=PAD), draw(8)
    batch = collate(examples, PAD)
    with torch.no_grad():
        own_BC = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask()).logits
        ours_BC = Network(model).class_logits(batch)
    differs_B = (own_BC - ours_BC).abs().amax(-1) > 1e-3
    assert differs_B.tolist() == [len(e.input_ids) > 1 and e.input_ids[-1] == PAD for e in examples]


@pytest.mark.parametrize("pad", [0, PAD])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_sees_no_padding(kind: str, pad: int):
    """Whatever fills the padding: RoBERTa's own pad id (0, from which it counts positions) or another."""
    model, examples = tiny_model(kind, TASK, num_labels=3), draw(8, 3)
    with torch.no_grad():
        logits_BC = Network(model).class_logits(collate(examples, pad))
    expected_BC = torch.stack([alone(model, example) for example in examples])
    assert torch.allclose(logits_BC, expected_BC, rtol=0, atol=1e-5)
    assert (expected_BC[0] - expected_BC[1]).abs().max() > 1e-3


# --- loss


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_loss_sum_equals_a_loop_over_rows(kind: str):
    model, examples = tiny_model(kind, TASK, num_labels=3), draw(8, 3)
    with torch.no_grad():
        loss = SequenceClassification.loss_sum(Network(model), collate(examples, 0))
    exact = copy.deepcopy(model).double()
    expected = 0.0
    for example in examples:
        row = alone(exact, example).tolist()
        expected += math.log(sum(map(math.exp, row))) - row[example.label or 0]
    assert loss.dtype == torch.float32
    assert abs(float(loss) - expected) < 2e-6 * expected


@pytest.mark.parametrize("size", [2, 5, 50])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_an_evaluation_is_the_same_in_batches_of_any_size(kind: str, size: int):
    model, examples = tiny_model(kind, TASK, num_labels=3), draw(13, 3)
    ones, figures = evaluate(model, examples, 1)
    many, others = evaluate(model, examples, size)
    assert torch.equal(ones["confusion"], many["confusion"])
    assert abs(float(many["loss"]) - float(ones["loss"])) < 1e-6 * float(ones["loss"])
    assert {name: value for name, value in others.items() if name != "loss"} == {
        name: value for name, value in figures.items() if name != "loss"
    }


def test_confusion_counts_truth_by_prediction():
    model, examples = tiny_model("llama", TASK, num_labels=3), draw(20, 3)
    sums, figures = evaluate(model, examples, 4)
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for example in examples:
        expected[example.label, int(alone(model, example).argmax())] += 1
    assert torch.equal(sums["confusion"], expected)
    assert figures["accuracy"] == float(expected.trace()) / 20
    assert abs(figures["loss"] - float(sums["loss"]) / 20) < 1e-12


# --- metrics

COUNTS = st.integers(0, 1000)


def f1_of(hits: int, predicted: int, true: int) -> float:
    """2 P R / (P + R), by precision and recall."""
    if not hits:
        return 0.0
    precision, recall = hits / predicted, hits / true
    return 2 * precision * recall / (precision + recall)


@settings(derandomize=True, database=None, deadline=None)
@given(tp=COUNTS, fp=COUNTS, fn=COUNTS, tn=COUNTS)
def test_two_classes(tp: int, fp: int, fn: int, tn: int):
    """F1 by precision and recall, Matthews by (tp tn - fp fn) / sqrt of the four margins."""
    confusion = torch.tensor([[tn, fp], [fn, tp]]).double()
    scores = [f1_of(hits, hits + b, hits + a) for hits, a, b in [(tn, fp, fn), (tp, fn, fp)] if hits + a + b]
    if scores:
        assert abs(macro_f1(confusion) - sum(scores) / len(scores)) < 1e-12
    margins = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = (tp * tn - fp * fn) / math.sqrt(margins) if margins else 0.0
    assert abs(matthews_correlation(confusion) - expected) < 1e-12


@settings(derandomize=True, database=None, deadline=None)
@given(cells=st.lists(st.integers(0, 30), min_size=9, max_size=9).filter(any))
def test_three_classes(cells: list[int]):
    """Matthews as Pearson's correlation of the one-hot rows of truth and prediction (Gorodkin 2004, eq. 2)."""
    confusion = torch.tensor(cells).reshape(3, 3)
    pairs = [(t, p) for t in range(3) for p in range(3) for _ in range(int(confusion[t, p]))]
    truth, said = (np.eye(3)[[pair[side] for pair in pairs]] for side in (0, 1))
    truth, said = truth - truth.mean(0), said - said.mean(0)
    spread = math.sqrt((truth**2).sum() * (said**2).sum())
    expected = (truth * said).sum() / spread if spread > 1e-9 else 0.0
    assert abs(matthews_correlation(confusion.double()) - expected) < 1e-9
    table = confusion.tolist()
    scores = []
    for k in range(3):
        predicted, true = sum(row[k] for row in table), sum(table[k])
        if predicted + true:
            scores.append(f1_of(table[k][k], predicted, true))
    assert abs(macro_f1(confusion.double()) - sum(scores) / len(scores)) < 1e-12


def test_metrics_by_hand():
    """10 rows of three classes, worked out in the comments."""
    confusion = torch.tensor([[2, 1, 0], [2, 2, 0], [0, 0, 3]]).double()
    assert abs(macro_f1(confusion) - (4 / 7 + 4 / 7 + 1) / 3) < 1e-12  # 2·2/(3+4), 2·2/(4+3), 2·3/(3+3)
    # hits 7 of 10; truth (3, 4, 3), predicted (4, 3, 3): 70 - 33 over sqrt((100 - 34) (100 - 34))
    assert abs(matthews_correlation(confusion) - 37 / 66) < 1e-12


@pytest.mark.parametrize(
    ("confusion", "f1", "correlation"),
    [
        ([[5, 0], [0, 5]], 1.0, 1.0),
        ([[0, 5], [5, 0]], 0.0, -1.0),
        ([[5, 0], [5, 0]], 1 / 3, 0.0),  # always the same answer
        ([[5, 0], [0, 0]], 1.0, 0.0),  # a class that does not occur is left out
        ([[25, 25], [25, 25]], 0.5, 0.0),
        ([[4, 0, 0], [0, 0, 0], [0, 0, 4]], 1.0, 1.0),
    ],
)
def test_extremes(confusion: list[list[int]], f1: float, correlation: float):
    table = torch.tensor(confusion).double()
    assert abs(macro_f1(table) - f1) < 1e-12
    assert abs(matthews_correlation(table) - correlation) < 1e-12


def test_scikit_learn_is_not_needed():
    folder = Path(lora_cli.__file__).parent
    assert not [path for path in folder.rglob("*.py") if "sklearn" in path.read_text()]
