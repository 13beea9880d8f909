"""Loss and metrics of next-token prediction, against a loop in float64 and examples by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_cli.data.batches import Batch, collate, evaluation_batches
from lora_cli.data.encoding import Example
from lora_cli.fusion.network import Network, takes_positions
from lora_cli.tasks import CausalLM
from tests.conftest import VOCABULARY, tiny_model

PAD = 3


def draw(count: int, seed: int = 0) -> list[Example]:
    """Rows of 2 to 30 tokens, some of them the pad id, with scattered targets."""
    generator = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        length = int(generator.integers(2, 31))
        ids = generator.integers(0, VOCABULARY, length).astype(np.int32)
        ids[generator.random(length) < 0.1] = PAD
        supervised = generator.random(length) < 0.4
        supervised[0], supervised[-1] = False, True
        examples.append(Example(ids, supervised, f"row {index}"))
    return examples


def naive_loss(model: Any, examples: list[Example]) -> float:
    """Each row alone, without padding, in float64, one target at a time."""
    model = copy.deepcopy(model).double()
    total = 0.0
    for example in examples:
        with torch.no_grad():
            logits_TV = model(torch.from_numpy(example.input_ids.astype(np.int64))[None]).logits[0]
        for position in np.flatnonzero(example.supervised):
            row = logits_TV[position - 1].tolist()
            total += math.log(sum(map(math.exp, row))) - row[int(example.input_ids[position])]
    return total


def evaluate(model: Any, examples: list[Example], size: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    total: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in evaluation_batches(examples, size, PAD):
            for name, value in CausalLM.sums(Network(model), batch).items():
                total[name] = total[name] + value if name in total else value
    return total, CausalLM.figures(total)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_sum_equals_a_loop_over_rows(kind: str):
    model, examples = tiny_model(kind), draw(9)
    with torch.no_grad():
        loss = CausalLM.loss_sum(Network(model), collate(examples, PAD))
    assert loss.dtype == torch.float32
    assert abs(float(loss) - naive_loss(model, examples)) < 2e-6 * float(loss)


def test_only_targets_count():
    """The negative control: one more target changes the loss by that token's own, and padding changes nothing."""
    model, examples = tiny_model("llama"), draw(4)
    loss = float(CausalLM.loss_sum(Network(model), collate(examples, PAD)).detach())
    unmasked = [Example(e.input_ids, np.arange(len(e.input_ids)) > 0, e.where) for e in examples]
    assert abs(float(CausalLM.loss_sum(Network(model), collate(unmasked, PAD)).detach()) - loss) > 1
    for pad in (0, 7, VOCABULARY - 1):
        assert float(CausalLM.loss_sum(Network(model), collate(examples, pad)).detach()) == loss


def test_the_head_runs_only_where_some_row_has_a_target():
    model = tiny_model("llama")
    ids = np.arange(12, dtype=np.int32)
    examples = [Example(ids, np.isin(ids, targets), "x") for targets in ([4, 5], [5, 11])]
    seen = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    CausalLM.loss_sum(Network(model), collate(examples, PAD))
    assert seen == [(2, 3, 32)]  # positions 3, 4 and 10 of 12


def test_targets_rows_and_logits_belong_together():
    model, examples = tiny_model("llama"), draw(5)
    batch = collate(examples, PAD)
    expected = [(row, int(i)) for row, e in enumerate(examples) for i in e.input_ids[e.supervised]]
    assert list(zip(batch.target_rows.tolist(), batch.targets.tolist(), strict=True)) == expected
    all_BTV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask()).logits
    where = [(row, position - 1) for row, e in enumerate(examples) for position in np.flatnonzero(e.supervised)]
    plain_MV = torch.stack([all_BTV[row, position] for row, position in where])
    assert torch.allclose(Network(model).supervised_logits(batch), plain_MV, rtol=0, atol=1e-5)


class AllPositions(nn.Module):
    """A model whose head cannot be run on chosen positions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = self.base_model = model
        self.config = model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


def test_models_without_chosen_positions_give_the_same_loss():
    model, batch = tiny_model("llama"), collate(draw(6), PAD)
    assert takes_positions(model)
    assert not takes_positions(AllPositions(model))
    one, other = CausalLM.loss_sum(Network(model), batch), CausalLM.loss_sum(Network(AllPositions(model)), batch)
    assert torch.allclose(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [2, 3, 5, 40])
def test_an_evaluation_is_the_same_in_batches_of_any_size(size: int):
    model, examples = tiny_model("llama"), draw(11)
    ones, figures = evaluate(model, examples, 1)
    many, others = evaluate(model, examples, size)
    for name in ("targets", "correct", "rows", "exact"):
        assert int(many[name]) == int(ones[name])
    assert abs(float(many["loss"]) - float(ones["loss"])) < 1e-6 * float(ones["loss"])
    assert others.keys() == figures.keys()
    assert others["token_accuracy"] == figures["token_accuracy"]
    assert others["exact_match"] == figures["exact_match"]


class Says(nn.Module):
    """A model that predicts, at every position, the token of a table."""

    def __init__(self, said_BT: list[list[int]]) -> None:
        super().__init__()
        self.said_BT = torch.tensor(said_BT)
        self.base_model = self

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool, logits_to_keep: Tensor) -> Any:
        logits_BKV = nn.functional.one_hot(self.said_BT, 9)[:, logits_to_keep].float()
        return type("Output", (), {"logits": logits_BKV})


def test_accuracy_and_exact_match_by_hand():
    """Three rows: all three targets right, one of two right, and the one right; so 5 of 6 tokens and 2 of 3 rows."""
    rows = [([1, 2, 3, 4], [1, 2, 3]), ([1, 5, 6], [1, 2]), ([7, 8, 1], [1])]
    examples = [
        Example(np.array(ids, dtype=np.int32), np.isin(np.arange(len(ids)), targets), "x") for ids, targets in rows
    ]
    model = Says([[2, 3, 4, 0], [5, 0, 0, 0], [8, 0, 0, 0]])  # what follows each position
    sums = CausalLM.sums(Network(model), collate(examples, pad_id=0))
    assert {name: int(sums[name]) for name in ("targets", "correct", "rows", "exact")} == {
        "targets": 6,
        "correct": 5,
        "rows": 3,
        "exact": 2,
    }
    figures = CausalLM.figures(sums)
    assert figures["token_accuracy"] == 5 / 6
    assert figures["exact_match"] == 2 / 3
    right, wrong = math.log(math.e + 8) - 1, math.log(math.e + 8)
    assert abs(figures["loss"] - (5 * right + wrong) / 6) < 1e-6
    assert figures["perplexity"] == math.exp(figures["loss"])


def test_a_perplexity_beyond_floats_is_a_number():
    sums = {"loss": torch.tensor(1e6), "targets": torch.tensor(1), "correct": torch.tensor(0)}
    figures = CausalLM.figures(sums | {"rows": torch.tensor(1), "exact": torch.tensor(0)})
    assert math.isfinite(figures["perplexity"])
    assert figures["loss"] == 1e6


def test_sums_of_many_tokens_keep_their_last_digits():
    """A float32 sum stops counting at 16,777,216; the evaluation adds in float64 and whole numbers."""
    batch: Batch = collate(draw(1), PAD)
    sums = CausalLM.sums(Network(tiny_model("llama")), batch)
    assert sums["loss"].dtype == torch.float64
    assert {sums[name].dtype for name in ("targets", "correct", "rows", "exact")} == {torch.int64}
