"""What is known before the first step: its numbers, its refusals, and all of them at once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_cli.commands import plan as plan_module
from lora_cli.commands.disk import disk_bytes
from lora_cli.commands.plan import Plan, make_plan
from lora_cli.commands.rows import position_limit
from lora_cli.commands.trainable import Counted
from lora_cli.device import choose_device
from lora_cli.errors import DataError, RecipeError, SeveralErrors, StorageError, UsageError
from lora_cli.models import empty_model
from lora_cli.recipe import load_recipe
from tests.conftest import chat_rows, labelled_rows, tiny_config, write_jsonl


@pytest.fixture
def plan(recipe) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        return make_plan(load_recipe(recipe(**changes)))

    return make


@pytest.fixture
def labelled(recipe, model_folder, tmp_path) -> Callable[..., Path]:
    """A recipe that classifies the given rows with a fresh head."""

    def write(rows: list[dict[str, Any]], kind: str = "llama", task: str = "causal_lm", **changes: Any) -> Path:
        path = write_jsonl(tmp_path / "labelled.jsonl", rows)
        base = {"path": str(model_folder(kind, task)), "dtype": "float32"}
        return recipe(task="sequence_classification", model=base, **{"dataset.path": str(path)}, **changes)

    return write


# --- the numbers of a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "batch", "accumulation", "per_epoch", "total"),
    [
        (3.0, 4, 1, 6, 18),
        (1.0, 4, 2, 3, 3),
        (1.0, 5, 1, 5, 5),
        (0.5, 4, 1, 6, 3),
        (0.01, 4, 1, 6, 1),
        (1.25, 7, 1, 4, 5),
    ],
)
def test_steps_are_epochs_of_24_rows_rounded_up(plan, epochs, batch, accumulation, per_epoch, total):
    made = plan(
        **{
            "training.max_steps": None,
            "training.num_train_epochs": epochs,
            "training.per_device_train_batch_size": batch,
            "training.gradient_accumulation_steps": accumulation,
        }
    )
    assert (made.steps.steps_per_epoch, made.total_steps) == (per_epoch, total)
    assert made.steps.epoch_of(made.total_steps) == total / per_epoch


@pytest.mark.parametrize(("epochs", "expected"), [(1.1, 55), (0.14, 7)])
def test_a_fraction_of_epochs_that_is_a_whole_number_of_steps_makes_no_step_more(plan, epochs, expected):
    changes = {"training.per_device_train_batch_size": 1, "training.max_steps": None}
    assert plan(rows=50, **changes, **{"training.num_train_epochs": epochs}).total_steps == expected


def test_max_steps_wins_over_epochs_and_says_so(plan):
    made = plan(**{"training.max_steps": 4, "training.num_train_epochs": 2.0})
    assert made.total_steps == 4
    assert "max_steps is set, so num_train_epochs is not used" in made.notes
    assert not any("num_train_epochs" in note for note in plan(**{"training.max_steps": 4}).notes)


@pytest.mark.parametrize(
    ("warmup", "total", "expected"), [(0.5, 8, 4), (3, 8, 3), (0, 8, 0), (0.03, 8, 1), (0.03, 1, 0)]
)
def test_warm_up_is_a_count_or_a_fraction_and_never_the_whole_run(plan, warmup, total, expected):
    assert plan(**{"training.warmup_steps": warmup, "training.max_steps": total}).warmup_steps == expected


def test_a_warm_up_longer_than_the_epochs_is_refused_at_its_place(recipe, lora):
    path = recipe(**{"training.max_steps": None, "training.num_train_epochs": 1.0, "training.warmup_steps": 6})
    result = lora("check", path)
    line = next(n for n, text in enumerate(path.read_text().splitlines(), start=1) if "warmup_steps" in text)
    assert result.code == 2
    assert f"--> {path}:{line}:3" in result.err
    assert "training.warmup_steps 6 steps of warm-up do not fit into a run of 6 steps" in result.err


def test_parameters_are_counted_as_in_the_closed_form(plan):
    """r (in + out) for each of 7 layers in 2 blocks of the tiny llama."""
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert plan().model.counted.trainable == 2 * sum(4 * (a + b) for a, b in shapes)


def test_disk_space_is_three_float32_copies_for_each_checkpoint_and_the_result(recipe):
    made = load_recipe(recipe(**{"training.save_total_limit": 3})).recipe
    assert disk_bytes(Counted(total=1000, trainable=100), made) == 3 * 400 * (3 + 2) + 400
    full = load_recipe(recipe(name="full.yaml", method="full", lora={})).recipe
    assert disk_bytes(Counted(total=1000, trainable=1000), full) == 3 * 4000 * 4 + 4000


def test_the_disk_figure_is_no_less_than_what_a_run_writes(recipe, lora, tmp_path):
    path = recipe(**{"training.save_steps": 1, "dataset.eval_size": 4, "training.eval_steps": 1, "lora.r": 16})
    promised = lora("check", path, "--json").json["disk_bytes"]
    assert lora("train", path).code == 0
    weights = [p for p in (tmp_path / "run").rglob("*.safetensors") if p.name != "rng.safetensors"]
    assert sum(p.stat().st_size for p in weights) < promised * 1.05  # headers of tiny tensors are not counted


def test_too_little_disk_is_exit_code_5_before_anything_is_written(recipe, lora, monkeypatch, tmp_path):
    monkeypatch.setattr(plan_module, "free_bytes", lambda path: 10)
    result = lora("train", recipe())
    assert result.code == 5
    assert "MB are free" in result.err
    assert not (tmp_path / "run").exists()
    with pytest.raises(StorageError):
        make_plan(load_recipe(recipe()))


# --- devices and types ----------------------------------------------------------------------------------------


def test_the_device_is_cuda_then_mps_then_cpu_unless_use_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert choose_device().type == "cuda"
    assert choose_device(use_cpu=True).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device().type == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device().type == "cpu"


@pytest.mark.parametrize(("method", "dtype"), [("lora", torch.bfloat16), ("full", torch.float32)])
def test_auto_is_bfloat16_on_a_device_that_is_fast_in_it_unless_all_weights_are_trained(
    plan, monkeypatch, model_folder, method, dtype
):
    monkeypatch.setattr("lora_cli.device.computes_bfloat16", lambda device: True)
    lora = {"r": 4} if method == "lora" else {}
    assert plan(method=method, lora=lora, model=str(model_folder("llama"))).dtype == dtype


@pytest.mark.parametrize(
    ("kind", "task", "expected"),
    [("gpt2", "causal_lm", 128), ("bert", "sequence_classification", 128), ("roberta", "sequence_classification", 129)],
)
def test_learned_positions_are_limited_and_robertas_begin_behind_the_pad_id(kind, task, expected):
    """The tiny roberta has 130 positions and the pad id 0, so 129 are for tokens."""
    assert position_limit(empty_model(tiny_config(kind), task)) == expected


def test_rotary_positions_have_no_limit_but_a_note(plan):
    rows = [{"prompt": "a", "completion": "the cat sees a bird " * 60}]
    assert position_limit(plan().model.skeleton) is None
    path = write_jsonl(Path(plan().recipe.dataset.path[0]).parent / "long.jsonl", rows * 4)
    made = plan(**{"dataset.path": str(path), "dataset.max_length": 200})
    assert "rows reach 200 tokens; the model was trained on at most 128" in made.notes


def test_rows_longer_than_learned_positions_are_refused_at_max_length(recipe, lora, model_folder, tmp_path):
    rows = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a", "completion": "the cat sees a bird " * 60}] * 4)
    base = {"path": str(model_folder("gpt2")), "dtype": "float32"}
    path = recipe(model=base, **{"dataset.path": str(rows), "dataset.max_length": 200})
    result = lora("check", path)
    assert result.code == 2
    assert "dataset.max_length rows reach 200 tokens, and the model has positions for 128" in result.err
    assert "help: set dataset.max_length: 128" in result.err


# --- labels ---------------------------------------------------------------------------------------------------


def test_a_fresh_head_takes_its_labels_from_the_rows(labelled):
    named = [row | {"label": ["neg", "pos"][row["label"]]} for row in labelled_rows(12)]
    made = make_plan(load_recipe(labelled(named)))
    assert made.labels == ["neg", "pos"]
    assert made.model.config.id2label == {0: "neg", 1: "pos"}
    assert made.model.skeleton.score.weight.shape == (2, 32)


def test_numbers_make_a_head_up_to_the_largest_one(labelled):
    rows = [row | {"label": [0, 3][row["label"]]} for row in labelled_rows(12)]
    assert make_plan(load_recipe(labelled(rows))).labels == ["0", "1", "2", "3"]


def test_a_trained_head_keeps_its_labels_and_refuses_others(labelled):
    fits = labelled(labelled_rows(12), "bert", "sequence_classification")
    assert make_plan(load_recipe(fits)).labels == ["LABEL_0", "LABEL_1"]
    rows = [row | {"label": ["neg", "pos"][row["label"]]} for row in labelled_rows(12)]
    with pytest.raises(DataError, match="the rows have neg, pos, the model knows LABEL_0, LABEL_1"):
        make_plan(load_recipe(labelled(rows, "bert", "sequence_classification")))


def test_rows_with_one_label_have_nothing_to_tell_apart(labelled):
    rows = [row | {"label": "pos"} for row in labelled_rows(12)]
    with pytest.raises(DataError, match=r"every row has the same label \(pos\)"):
        make_plan(load_recipe(labelled(rows)))


# --- mistakes -------------------------------------------------------------------------------------------------


def test_a_target_that_matches_nothing_is_told_at_its_line_with_the_real_names(recipe, lora):
    path = recipe(**{"lora.target_modules": ["q_proj", "kproj"]})
    result = lora("train", path)
    line = next(n for n, text in enumerate(path.read_text().splitlines(), start=1) if "kproj" in text)
    assert result.code == 2
    assert f"{line:>3} | " in result.err
    assert "lora.target_modules: no layer is named 'kproj'" in result.err
    assert "did you mean k_proj?" in result.err
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in result.err


def test_mistakes_of_independent_parts_are_told_together(recipe, lora, tmp_path):
    path = recipe(model=str(tmp_path / "no-model"), **{"dataset.path": str(tmp_path / "no-rows.jsonl")})
    result = lora("train", path, "--json")
    assert result.code == 2
    assert f"there is no folder {tmp_path / 'no-model'}" in result.err
    assert "no-rows.jsonl" in result.err
    assert result.err.count("error:") == 2
    with pytest.raises(SeveralErrors):
        make_plan(load_recipe(path))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(plan, model_folder):
    small = model_folder("llama", vocab_size=64)
    with pytest.raises(UsageError, match=r"the tokenizer gives id \d+, and the model embeds ids below 64 only"):
        plan(model=str(small))


@pytest.mark.parametrize(
    ("row", "changes", "key"),
    [
        ({"text": "the cat"}, {"dataset.system_prompt": "Be short."}, "system_prompt"),
        ({"text": "the cat"}, {"dataset.train_on_prompt": True}, "train_on_prompt"),
        ({"prompt": "the", "completion": " cat"}, {"dataset.too_long": "split"}, "too_long"),
        ({"prompt": "the", "completion": " cat"}, {"dataset.name": "main"}, "name"),
    ],
)
def test_a_key_that_these_rows_leave_without_effect_is_refused_at_its_place(recipe, lora, tmp_path, row, changes, key):
    rows = write_jsonl(tmp_path / "other.jsonl", [row] * 8)
    path = recipe(**{"dataset.path": str(rows)}, **changes)
    result = lora("check", path)
    line = next(n for n, text in enumerate(path.read_text().splitlines(), start=1) if f"{key}:" in text)
    assert result.code == 2, result.out
    assert f"--> {path}:{line}:3" in result.err
    assert f"dataset.{key}" in result.err


def test_more_evaluation_rows_than_rows_are_refused(plan):
    with pytest.raises(RecipeError, match="keeps 24 of 24 rows from training: none is left"):
        plan(**{"dataset.eval_size": 24})


def test_a_run_without_evaluation_rows_gets_a_note_and_one_with_them_does_not(plan):
    note = "no evaluation rows: set dataset.eval_size to see what the training brings"
    assert note in plan().notes
    assert note not in plan(**{"dataset.eval_size": 4}).notes
    assert "training.eval_steps has no effect without evaluation rows" in plan(**{"training.eval_steps": 2}).notes


@pytest.mark.parametrize(("pad", "eos", "expected"), [(0, 2, 0), (None, 2, 2)])
def test_padding_is_filled_with_the_pad_token_or_else_any_id_of_the_vocabulary(plan, pad, eos, expected):
    made = plan()
    assert made.tokenizer.eos_token_id == eos
    made.tokenizer.pad_token_id = pad
    made.model.config.pad_token_id = None
    assert made.pad_id == expected


def test_a_folder_without_weights_is_planned_with_a_note(plan, model_folder, tmp_path):
    folder = tmp_path / "light"
    shutil.copytree(model_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    note = f"this can be planned and not be trained: {folder} holds no model.safetensors"
    assert note in plan(**{"model.path": str(folder)}).notes
    assert not any("planned" in text for text in plan().notes)


def test_a_random_base_is_planned_from_its_inline_configuration(plan, model_folder):
    config = json.loads((model_folder("llama") / "config.json").read_text())
    inline = {key: config[key] for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")}
    inline |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    made = plan(model={"config": inline, "tokenizer": str(model_folder("llama"))})
    assert made.model.folder is None
    assert made.model.counted.total == plan().model.counted.total


def test_a_plan_reads_no_weight_and_allocates_none(plan, monkeypatch, model_folder, tmp_path):
    folder = tmp_path / "config-only"
    folder.mkdir()
    for file in model_folder("llama").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    made = plan(model=str(folder))
    assert {parameter.device.type for parameter in made.model.skeleton.parameters()} == {"meta"}
    assert math.prod(made.model.skeleton.get_input_embeddings().weight.shape) == 320 * 32


def test_rows_are_counted_once_and_every_one_is_somewhere(plan, tmp_path):
    rows = write_jsonl(tmp_path / "many.jsonl", [*chat_rows(20), {"messages": []}])
    made = plan(**{"dataset.path": str(rows), "dataset.on_bad_row": "skip", "dataset.eval_size": 5})
    counts = made.dataset.train_counts
    assert counts.rows == 21
    assert counts.examples + made.dataset.eval_counts.examples + len(counts.bad) == 21
