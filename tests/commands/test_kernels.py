"""How many kernels oneDNN makes, against what it says itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lora_cli.commands.kernels import BATCHES_LOOKED_AT, OF_TRIALS, Attention, Sizes, count_kernels
from lora_cli.data.batches import Layout, collate
from lora_cli.ops.rows import Rows
from tests.commands.test_memory import planner
from tests.training.test_loop import EXAMPLES

LINE = Layout(end_to_end=True, looks_at="targets")
ATTENTION = Attention(4, 2, torch.bfloat16, causal=True)


def sizes(*groups: int, attention: Attention = ATTENTION) -> Sizes:
    """Of batches of the first rows, so many each."""
    return Sizes.of((collate(EXAMPLES[:count], 0, LINE) for count in groups), attention, 40)


def test_a_size_is_counted_once_however_often_it_comes():
    assert sizes(3, 3, 3) == sizes(3)
    assert len(sizes(2, 3, 4).lines) == 3
    assert sizes(4).targets == {40}, "more are cut into chunks"
    assert sizes(4, attention=Attention(0, 0, torch.bfloat16, causal=True)).tiles == set()


def test_no_more_batches_are_looked_at_than_can_matter():
    endless = (collate(EXAMPLES[:2], 0, LINE) for _ in iter(int, 1))
    assert Sizes.of(endless, ATTENTION, 40) == sizes(2)
    assert BATCHES_LOOKED_AT * 33 > 512


def test_what_training_has_met_is_not_new_to_an_evaluation():
    assert count_kernels(sizes(2, 3), sizes(3)) == count_kernels(sizes(2, 3), Sizes())
    assert count_kernels(sizes(2, 3), sizes(4)) > count_kernels(sizes(2, 3), Sizes())
    assert count_kernels(Sizes(), Sizes()) == OF_TRIALS


def test_tiles_are_those_that_attention_is_cut_into():
    (tile,) = ATTENTION.tiles(Rows.of([32]))
    assert tile == (2, 64, 32), "two heads share a key-value head"


@pytest.mark.slow
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN makes none here")
def test_the_count_is_onednns_own(recipe, tmp_path):
    """Within a quarter: small matrices are transposed where large ones are not."""
    path = recipe(rows=40, **{"model.dtype": "bfloat16", "training.max_steps": 6, "dataset.eval_size": 8})
    found = planner(path)
    kernels = found._sizes_met(found.plan.steps, found._evaluated(found.plan.steps))
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    variables = os.environ | dict.fromkeys(names, "9999") | {"ONEDNN_VERBOSE": "profile_create"}
    command = [sys.executable, "-m", "lora_cli", "train", str(path), "--json"]
    said = subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout
    assert kernels == pytest.approx(said.count("create:cache_miss"), rel=0.25)
