"""`lora check`: true figures, nothing written, and the errors that `lora train` would raise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_cli.commands.check import Excerpt, check, excerpt, spread
from lora_cli.recipe import load_recipe
from tests.conftest import labelled_rows, write_jsonl


def snapshot(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_writes_nothing(recipe, lora, tmp_path):
    path = recipe()
    before = snapshot(tmp_path)
    assert lora("check", path).code == 0
    assert snapshot(tmp_path) == before


def test_its_figures_are_those_of_the_training_run(recipe, lora):
    path = recipe(**{"dataset.eval_size": 4, "training.gradient_accumulation_steps": 2})
    checked, trained = lora("check", path, "--json").json, lora("train", path, "--json").json
    assert checked["steps"] == trained["steps"] == 4
    assert checked["parameters"]["learnable"] == trained["parameters"]["trainable"]
    assert checked["parameters"]["total"] == trained["parameters"]["total"]
    assert (checked["train"]["examples"], checked["eval"]["examples"]) == (20, 4)
    assert trained["rows"] == {"train": 20, "eval": 4}
    assert (checked["device"], checked["dtype"]) == (trained["device"], trained["dtype"])
    assert checked["rows_per_step"] == 8
    assert checked["steps_per_epoch"] == 3


def test_it_plans_for_several_processes(recipe, lora):
    """A step takes a micro-batch of each, and the memory shown is that of one."""
    path = recipe(**{"training.strategy": "fsdp"})
    alone, three = (lora("check", path, "--json", "--nproc-per-node", count).json for count in (1, 3))
    assert (alone["processes"], three["processes"]) == (1, 3)
    assert three["rows_per_step"] == 3 * alone["rows_per_step"]
    assert three["memory"]["gathered"] > alone["memory"]["gathered"] == 0
    assert any("shards nothing in a single process" in note for note in alone["notes"])
    assert not any("fsdp" in note for note in three["notes"])
    shown = lora("check", path, "--nproc-per-node", 3).out
    assert "memory of each of 3 processes" in shown
    assert "12 rows (4 in a micro-batch x 1 x 3 processes)" in shown
    assert "memory of each" not in lora("check", path).out
    refused = lora("check", path, "--nproc-per-node", 0)
    assert refused.code == 2
    assert "--nproc-per-node must be 1 or more, not 0" in refused.err


def test_processes_without_a_device_are_refused_as_training_does(recipe, lora, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused = lora("check", recipe(**{"training.use_cpu": False}), "--nproc-per-node", 3)
    assert refused.code == 2
    assert "--nproc-per-node 3 needs 3 CUDA devices, and there are 2" in refused.err
    assert lora("check", recipe(), "--nproc-per-node", 3).code == 0, "on the CPU there is room for all"


def test_tokens_and_targets_are_spread_over_all_rows(recipe):
    result = check(load_recipe(recipe()))
    lengths = sorted(len(example.input_ids) for example in result.plan.dataset.train)
    targets = sorted(example.num_targets for example in result.plan.dataset.train)
    assert (result.tokens.minimum, result.tokens.maximum) == (lengths[0], lengths[-1])
    assert (result.targets.minimum, result.targets.maximum) == (targets[0], targets[-1])
    assert result.tokens.median == int(np.median(lengths))
    assert result.to_dict()["train"]["tokens"] == sum(lengths)


@pytest.mark.parametrize(
    ("values", "expected"), [([5], (5, 5, 5)), ([3, 1, 2], (1, 2, 3)), ([1, 2, 3, 10], (1, 2, 10))]
)
def test_a_spread_is_least_median_and_most(values, expected):
    result = spread(values)
    assert (result.minimum, result.median, result.maximum) == expected


def test_the_excerpt_is_the_first_row_with_the_assistants_turn_supervised(recipe):
    result = check(load_recipe(recipe(**{"dataset.shuffle": False})))
    (prompt, before), (answer, supervised), *rest = result.excerpt.pieces
    assert (before, supervised) == (False, True)
    assert prompt.startswith("<|im_start|>user\n")
    assert prompt.endswith("<|im_start|>assistant\n")
    assert answer.endswith("<|im_end|>")
    assert [flag for _, flag in rest] in ([], [False])
    assert result.excerpt.where.endswith("rows.jsonl:1")


def test_the_excerpts_pieces_are_the_whole_row(recipe):
    result = check(load_recipe(recipe()))
    example = result.plan.dataset.train[0]
    assert "".join(text for text, _ in excerpt(example, result.plan).pieces) == result.plan.tokenizer.decode(
        example.input_ids
    )
    assert isinstance(result.excerpt, Excerpt)


def test_a_pipe_shows_what_is_supervised_in_brackets(recipe, lora):
    out = lora("check", recipe(**{"dataset.shuffle": False})).out
    assert "supervised text is in [[ ]]" in out
    assert "<|im_start|>assistant\n[[" in out


def test_it_shows_every_group_of_adapted_modules_with_shapes_scale_and_parameters(recipe, lora):
    out = lora("check", recipe(**{"lora.target_modules": ["q_proj", "down_proj"]})).out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("model.layers")}
    assert rows["model.layers.{0..1}.self_attn.q_proj"] == ["2", "4", "x", "32", "32", "x", "4", "2", "512"]
    assert rows["model.layers.{0..1}.mlp.down_proj"] == ["2", "4", "x", "48", "32", "x", "4", "2", "640"]


def test_a_classifier_shows_its_labels(recipe, lora, tmp_path):
    rows = write_jsonl(
        tmp_path / "labelled.jsonl", [row | {"label": ["neg", "pos"][row["label"]]} for row in labelled_rows(12)]
    )
    path = recipe(task="sequence_classification", **{"dataset.path": str(rows)})
    result = lora("check", path, "--json").json
    assert result["labels"] == ["neg", "pos"]
    assert result["modules_to_save"] == ["score"]
    assert "neg, pos" in lora("check", path).out


def test_truncated_rows_are_counted_in_both_forms(recipe, lora):
    path = recipe(**{"dataset.max_length": 50})
    result = lora("check", path, "--json").json
    assert result["tokens_per_row"]["maximum"] == 50
    assert result["train"]["truncated"] > 0
    assert f"{result['train']['truncated']} rows at max_length 50: what stands behind it" in lora("check", path).out


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"lora.target_modules": ["nothing"]}, 2),
        ({"dataset.path": "missing.jsonl"}, 6),
        ({"model": "no/such/folder/"}, 2),
    ],
)
def test_it_refuses_what_training_refuses_in_the_same_words(recipe, lora, changes, code):
    path = recipe(**changes)
    checked, trained = lora("check", path), lora("train", path)
    assert checked.code == trained.code == code
    assert checked.err == trained.err


def test_a_folder_with_somebody_elses_files_is_refused_by_both(recipe, lora, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    path = recipe()
    for command in ("check", "train"):
        result = lora(command, path)
        assert result.code == 2
        assert "holds other files (thesis.txt) and no run of lora" in result.err
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"
    assert lora("train", path, "--fresh").code == 2, "not even --fresh moves them"
