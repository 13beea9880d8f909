"""The same command again goes on: whatever stopped the run, it ends in the bytes of one that was never stopped."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.commands import train as train_command
from lora_cli.commands.identity import FREE_KEYS, check_same_run, fixed_keys
from lora_cli.commands.train import Outcome, train
from lora_cli.errors import FolderInUseError, RecipeError, Stopped, StorageError
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.recipe.messages import all_keys
from lora_cli.report.training import Silence
from lora_cli.storage import hold_folder
from lora_cli.training import run as run_module
from lora_cli.training.checkpoint import read_state
from tests.conftest import chat_rows, labelled_rows, tiny_model, write_jsonl
from tests.processes import finish, printed, start

BUSY = {  # everything that has a state: dropout, moments, evaluations, a best adapter, windows of metrics
    "training.max_steps": 7,
    "training.eval_steps": 3,
    "training.save_steps": 2,
    "training.logging_steps": 2,
    "training.gradient_accumulation_steps": 2,
    "training.per_device_train_batch_size": 2,
    "dataset.eval_size": 5,
    "lora.lora_dropout": 0.2,
}


class Observer(Silence):
    def __init__(self, at: dict[int, Callable[[], None]] | None = None) -> None:
        self.at = at or {}
        self.done: list[int] = []

    def step(self, step, state) -> None:
        self.done.append(step.number)
        self.at.get(step.number, lambda: None)()


def run(path: Path, observer: Observer | None = None, **flags: Any) -> Outcome:
    return train(load_recipe(path), observer or Observer(), **flags)


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_after(path: Path, step: int) -> Path:
    """Train until ``step`` is done, be asked to stop, and return the output folder."""
    with pytest.raises(Stopped, match=f"after step {step} of"):
        run(path, Observer({step: ask_to_stop}))
    return path.parent / "run"


def result_of(folder: Path) -> dict[str, bytes]:
    """Every file that a run delivers, less its card's and manifest's mention of where and when."""
    delivered = folder / "adapter" if (folder / "adapter").is_dir() else folder / "model"
    return {path.name: path.read_bytes() for path in delivered.iterdir() if path.name != "manifest.json"}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Every line, less what depends on the clock and on other processes."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = ("tokens_per_second", "peak_memory_bytes")
    return [{key: value for key, value in line.items() if key not in machine} for line in lines]


@pytest.fixture
def straight(recipe, tmp_path) -> Callable[..., Path]:
    """``straight(**changes)``: the folder of the same run, never stopped."""

    def make(**changes: Any) -> Path:
        path = recipe(name="straight.yaml", output_dir=str(tmp_path / "straight"), **changes)
        return run(path).output.root

    return make


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_stopped_by_a_signal_it_ends_bit_for_bit_like_the_uninterrupted_run(recipe, straight, step):
    reference = straight(**BUSY)
    folder = stop_after(recipe(**BUSY), step)
    observer = Observer()
    run(recipe(**BUSY), observer)
    assert observer.done == list(range(step + 1, 8)), "it goes on, it does not start over"
    assert result_of(folder) == result_of(reference)
    assert metrics_of(folder) == metrics_of(reference)


def test_stopped_after_every_single_step_it_still_ends_in_the_same_bytes(recipe, straight):
    reference, path = straight(**BUSY), recipe(**BUSY)
    for step in range(1, 7):
        stop_after(path, step)
    folder = run(path).output.root
    assert result_of(folder) == result_of(reference)
    assert metrics_of(folder) == metrics_of(reference)


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


def test_a_crash_loses_the_steps_since_the_last_save_and_nothing_else(recipe, straight):
    reference, path = straight(**BUSY), recipe(**BUSY)
    with pytest.raises(Crash):
        run(path, Observer({5: crash}))
    observer = Observer()
    folder = run(path, observer).output.root
    assert observer.done == [5, 6, 7], "saved after step 4"
    assert result_of(folder) == result_of(reference)
    assert metrics_of(folder) == metrics_of(reference)


def test_a_crash_before_the_first_save_starts_over(recipe, straight):
    reference, path = straight(**BUSY), recipe(**BUSY)
    with pytest.raises(Crash):
        run(path, Observer({1: crash}))
    folder = run(path).output.root
    assert result_of(folder) == result_of(reference)
    assert metrics_of(folder) == metrics_of(reference)


@pytest.mark.parametrize("method", ["full", "head"])
def test_the_baselines_resume_bit_for_bit_too(recipe, straight, tmp_path, method):
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(20))
    changes = {"method": method, "task": "sequence_classification", "lora": {}, "dataset.path": str(rows)}
    reference = straight(**changes)
    folder = stop_after(recipe(**changes), 2)
    run(recipe(**changes))
    assert result_of(folder) == result_of(reference)
    assert "model.safetensors" in result_of(folder)


def test_every_step_stands_in_the_metrics_once(recipe):
    path = recipe(**{"training.max_steps": 6, "training.save_steps": 3})
    for step in (2, 5):
        stop_after(path, step)
    with pytest.raises(Crash):
        run(path, Observer({6: crash}))
    folder = run(path).output.root
    assert [line["step"] for line in metrics_of(folder)] == [1, 2, 3, 4, 5, 6]


def damage(path: Path, how: str) -> None:
    target = path / ("manifest.json" if how == "no manifest" else "optimizer.safetensors")
    raw = bytearray(target.read_bytes())
    raw[-1] ^= 0x40
    target.unlink()
    if how != "no manifest":
        target.write_bytes(raw if how == "flipped byte" else raw[:-7])


@pytest.mark.parametrize("how", ["flipped byte", "truncated file", "no manifest"])
def test_with_a_damaged_newest_checkpoint_it_goes_on_from_the_one_before(recipe, straight, how):
    reference, path = straight(**BUSY), recipe(**BUSY)
    folder = stop_after(path, 5)
    damage(folder / "checkpoints" / "step-000005", how)
    observer = Observer()
    run(path, observer)
    assert observer.done == [5, 6, 7]
    assert result_of(folder) == result_of(reference)
    assert metrics_of(folder) == metrics_of(reference)


def test_with_every_checkpoint_damaged_it_starts_over_and_ends_in_the_same_bytes(recipe, straight):
    reference, path = straight(**BUSY), recipe(**BUSY)
    folder = stop_after(path, 5)
    for checkpoint in (folder / "checkpoints").iterdir():
        damage(checkpoint, "flipped byte")
    observer = Observer()
    run(path, observer)
    assert observer.done == [1, 2, 3, 4, 5, 6, 7]
    assert result_of(folder) == result_of(reference)


def test_a_damaged_best_checkpoint_is_not_delivered(recipe, monkeypatch):
    """Its weights would go out as the result without anybody looking at their hash."""
    losses = iter([5.0, 1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(run_module, "evaluate", lambda *rows, **options: {"loss": next(losses)})
    path = recipe(**{"training.eval_steps": 1, "dataset.eval_size": 6})
    folder = stop_after(path, 3)
    state = read_state(folder / "checkpoints" / "step-000003")
    assert state.best.step == 1
    weights = folder / "checkpoints" / "step-000001" / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 0x40
    weights.write_bytes(raw)
    with pytest.raises(StorageError, match=r"step-000001 is damaged") as caught:
        run(path)
    assert "--fresh" in str(caught.value)
    assert not (folder / "adapter").exists()


def test_a_finished_run_says_so_and_changes_nothing(recipe, lora):
    path = recipe(**{"dataset.eval_size": 4})
    first = lora("train", path, "--json")
    folder = path.parent / "run"
    before = {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
    again = lora("train", path)
    assert again.code == 0
    assert "this run is finished already; type --fresh to train again" in again.out
    assert lora("train", path, "--json").json == first.json
    assert {file: file.read_bytes() for file in folder.rglob("*.*") if file.is_file()} == before


@pytest.mark.parametrize("what", ["adapter", "summary.json"])
def test_a_finished_run_whose_result_is_gone_delivers_it_again_without_training(recipe, what):
    path = recipe(**BUSY)
    folder = run(path).output.root
    before = result_of(folder)
    shutil.rmtree(folder / what) if what == "adapter" else (folder / what).unlink()
    observer = Observer()
    run(path, observer)
    assert observer.done == []
    assert result_of(folder) == before
    assert json.loads((folder / "summary.json").read_text())["steps"] == 7


def test_a_finished_run_whose_adapter_is_damaged_delivers_it_again(recipe):
    path = recipe()
    folder = run(path).output.root
    before = result_of(folder)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    run(path)
    assert result_of(folder) == before


def test_changed_keys_are_refused_each_by_its_name_and_place(recipe, lora):
    path = recipe()
    folder = stop_after(path, 2)
    kept = {name: (folder / name).read_text() for name in ("recipe.yaml", "resolved.yaml")}
    changed = recipe(**{"training.learning_rate": 0.5, "lora.r": 2, "training.seed": 7, "dataset.max_length": 32})
    result = lora("train", changed)
    assert result.code == 2
    text = changed.read_text().splitlines()
    for key, then, now in [
        ("training.learning_rate", "0.01", "0.5"),
        ("lora.r", "4", "2"),
        ("lora.lora_alpha", "8.0", "4.0"),
        ("training.seed", "42", "7"),
        ("dataset.max_length", "64", "32"),
    ]:
        assert f"{key} was {then} when this run began, and is {now}" in result.err
    line = next(number for number, content in enumerate(text, start=1) if "learning_rate" in content)
    assert f"--> {changed}:{line}:3" in result.err
    assert "put it back to go on, type --fresh to start over, or choose another output_dir" in result.err
    assert {name: (folder / name).read_text() for name in kept} == kept, "a refused run leaves no trace"


def test_a_key_that_there_was_not_yet_had_its_default(recipe):
    """A run that an earlier version began goes on; a key that is set meanwhile is told as any other."""
    now = fixed_keys(load_recipe(recipe()).recipe)
    key = "training.use_liger_kernel"
    then = {name: value for name, value in now.items() if name != key}
    check_same_run(then, now)
    with pytest.raises(RecipeError, match=re.escape(f"{key}: was false when this run began, and is true")):
        check_same_run(then, now | {key: True})
    with pytest.raises(
        RecipeError, match=re.escape("lora.loftq_config.loftq_bits: was 4 when this run began, and is 2")
    ):
        check_same_run({}, {"lora.loftq_config.loftq_bits": 2})


def test_a_changed_switch_is_told_in_yamls_words(recipe, lora):
    stop_after(recipe(), 2)
    result = lora("train", recipe(**{"dataset.shuffle": False, "training.max_grad_norm": None}))
    assert "dataset.shuffle was true when this run began, and is false" in result.err
    assert "training.max_grad_norm was 1.0 when this run began, and is null" in result.err


def test_an_override_that_changes_the_run_is_refused_by_its_argument(recipe, lora):
    path = recipe()
    stop_after(path, 2)
    result = lora("train", path, "training.learning_rate=0.5")
    assert result.code == 2
    assert "--> argument training.learning_rate=0.5" in result.err


FREE = {
    "training.logging_steps": 3,
    "training.save_steps": 1,
    "training.save_total_limit": 5,
    "training.report_to": "tensorboard",
    "training.per_device_eval_batch_size": 1,
    "training.gradient_checkpointing": True,
    "training.strategy": "fsdp",
    "training.use_cpu": True,
}


@pytest.mark.parametrize("key", sorted(FREE))
def test_a_key_that_changes_no_number_may_change_on_the_way(recipe, straight, key):
    reference = straight(**BUSY)
    folder = stop_after(recipe(**BUSY), 3)
    run(recipe(**BUSY | {key: FREE[key]}))
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert all(result_of(folder)[name] == result_of(reference)[name] for name in names)


FREE_TOGETHER = {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 4}
FREE_INSTEAD = {"training.per_device_train_batch_size": 3, "training.global_batch_size": 4}


@pytest.mark.parametrize("cut", [FREE_TOGETHER, FREE_INSTEAD], ids=["accumulated", "global"])
def test_the_rows_of_a_step_may_be_cut_in_another_way(recipe, straight, cut):
    """What an out-of-memory error advises: the same steps, within float tolerance."""
    changes = {"training.max_steps": 7}
    reference = straight(**changes)
    folder = stop_after(recipe(**changes), 3)
    observer = Observer()
    run(recipe(**changes | cut), observer)
    assert observer.done == [4, 5, 6, 7]
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, reference))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


def test_another_number_of_rows_in_a_step_is_refused(recipe, lora):
    stop_after(recipe(), 2)
    result = lora("train", recipe(**{"training.gradient_accumulation_steps": 2}))
    assert result.code == 2
    assert (
        "training.per_device_train_batch_size x gradient_accumulation_steps x processes (or global_batch_size) made "
        "4 rows a step when this run began, and makes 8"
    ) in result.err


def test_the_output_folder_and_the_files_of_the_rows_may_move(recipe, straight, tmp_path):
    held_out = write_jsonl(tmp_path / "held-out.jsonl", chat_rows(3))
    changes = {"dataset.eval_path": str(held_out)}
    reference = straight(**changes)
    folder = stop_after(recipe(**changes), 2)
    folder.rename(tmp_path / "moved")
    for name in ("rows.jsonl", "held-out.jsonl"):
        shutil.copy(tmp_path / name, tmp_path / f"copy-of-{name}")
    moved = {"dataset.path": str(tmp_path / "copy-of-rows.jsonl"), "output_dir": str(tmp_path / "moved")}
    observer = Observer()
    run(recipe(**moved, **{"dataset.eval_path": str(tmp_path / "copy-of-held-out.jsonl")}), observer)
    assert observer.done == [3, 4]
    name = "adapter_model.safetensors"
    assert result_of(tmp_path / "moved")[name] == result_of(reference)[name]


def test_every_key_is_either_compared_or_shown_here_to_be_free():
    recipe = Recipe.model_validate({"model": {"path": "m"}, "dataset": {"path": "d"}, "output_dir": "o"})
    leaves = {key for key in all_keys() if not any(other.startswith(f"{key}.") for other in all_keys())}
    assert set(fixed_keys(recipe)) == leaves - FREE_KEYS
    with_fewer_layers = "training.cache_frozen_layers"  # shown in test_caching.py
    moved = "lora.init_from"  # shown in test_init_from.py
    shown = {*FREE, *FREE_TOGETHER, *FREE_INSTEAD, with_fewer_layers, moved}
    assert {*shown, "output_dir", "dataset.path", "dataset.eval_path"} == FREE_KEYS


def test_changed_rows_are_refused(recipe, tmp_path):
    path = recipe()
    stop_after(path, 2)
    rows = chat_rows(24)
    rows[5]["messages"][1]["content"] += " bird"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(RecipeError, match="holds other rows than when this run began"):
        run(path)


def test_a_changed_base_is_refused(recipe, tmp_path, model_folder):
    base = shutil.copytree(model_folder("llama"), tmp_path / "base")
    path = recipe(model={"path": str(base), "dtype": "float32"})
    stop_after(path, 2)
    tiny_model("llama", seed=9).save_pretrained(base)
    with pytest.raises(RecipeError, match="holds other weights than when this run began"):
        run(path)


def test_fresh_keeps_the_earlier_run_aside_whole(recipe, lora):
    path = recipe()
    folder = stop_after(path, 2)
    before = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}
    before.pop(Path(".lock"), None)
    changed = recipe(**{"training.learning_rate": 0.02})
    result = lora("train", changed, "--fresh")
    assert result.code == 0, result.err
    assert "earlier-001" in result.out
    aside = folder / "earlier-001"
    assert {file.relative_to(aside): file.read_bytes() for file in aside.rglob("*.*") if file.is_file()} == before
    assert [line["step"] for line in metrics_of(folder)] == [1, 2, 3, 4]


def test_each_fresh_run_gets_a_number_of_its_own_even_where_one_was_deleted(recipe):
    path = recipe(**{"training.max_steps": 1})
    folder = run(path).output.root
    run(path, fresh=True)
    run(path, fresh=True)
    assert sorted(entry.name for entry in folder.glob("earlier-*")) == ["earlier-001", "earlier-002"]
    shutil.rmtree(folder / "earlier-001")
    run(path, fresh=True)
    assert sorted(entry.name for entry in folder.glob("earlier-*")) == ["earlier-002", "earlier-003"]


def test_fresh_in_an_empty_folder_is_an_ordinary_run(recipe):
    folder = run(recipe(**{"training.max_steps": 1}), fresh=True).output.root
    assert list(folder.glob("earlier-*")) == []


def test_a_fresh_run_that_dies_at_its_beginning_can_be_started_again(recipe, monkeypatch):
    """Nothing but the earlier run is in the folder then, and that must not look like somebody else's files."""
    path = recipe(**{"training.max_steps": 1})
    run(path)
    monkeypatch.setattr(train_command, "fingerprint", lambda folder: crash())
    with pytest.raises(Crash):
        run(path, fresh=True)
    monkeypatch.undo()
    outcome = run(path)
    assert not outcome.already_finished
    assert (outcome.output.root / "earlier-001" / "adapter").is_dir()


def test_a_kill_while_the_earlier_run_is_moved_aside_leaves_a_folder_that_can_be_used(recipe, monkeypatch):
    path = recipe(**{"training.max_steps": 1})
    count = len([entry for entry in run(path).output.root.iterdir() if entry.name != ".lock"])
    rename = os.rename
    for moved in range(count):
        calls = itertools.count()
        monkeypatch.setattr(
            os, "rename", lambda a, b, calls=calls, moved=moved: crash() if next(calls) == moved else rename(a, b)
        )
        with pytest.raises(Crash):
            run(path, fresh=True)
        monkeypatch.undo()
        assert run(path, fresh=True).summary.steps == 1


def test_a_random_base_survives_a_kill_while_it_is_made(recipe, model_folder, monkeypatch):
    config = json.loads((model_folder("llama") / "config.json").read_text())
    inline = {key: config[key] for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")}
    inline |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = recipe(model={"config": inline, "tokenizer": str(model_folder("llama")), "dtype": "float32"})
    monkeypatch.setattr(train_command, "fingerprint", lambda folder: crash())
    with pytest.raises(Crash):
        run(path)
    monkeypatch.undo()
    assert run(path).summary.steps == 4


def test_a_folder_that_another_process_holds_is_refused_and_stays_untouched(recipe, lora):
    path = recipe()
    folder = stop_after(path, 2)
    with hold_folder(folder):
        result = lora("train", path)
        assert (result.code, result.out.count("\n")) == (7, 0)
        assert f"another run is writing to {folder}" in result.err
        with pytest.raises(FolderInUseError):
            run(path, fresh=True)
    assert not (folder / "earlier-001").exists()
    assert run(path).summary.steps == 4


# --- real processes, real signals -------------------------------------------------------------------------------


def wait_for_step(folder: Path, step: int, process: Any) -> None:
    deadline = time.monotonic() + 60
    metrics = folder / "metrics.jsonl"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= step):
        assert process.is_alive() and time.monotonic() < deadline, printed(folder.parent)
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_process_with_128_plus_its_number_and_the_finished_step_saved(recipe, number, code):
    path = recipe(**{"training.max_steps": 1000})
    folder, process = path.parent / "run", start(path.parent, "train", path, pause=0.05)
    wait_for_step(folder, 2, process)
    os.kill(process.pid, number)
    assert finish(process) == code
    (checkpoint,) = (folder / "checkpoints").iterdir()
    steps = [line["step"] for line in metrics_of(folder)]
    assert steps == list(range(1, read_state(checkpoint).step + 1))
    log = printed(path.parent)
    assert f"stopped by {number.name} after step {steps[-1]} of 1000; everything is saved" in log
    assert "type the same command again to go on" in log
    assert "Traceback" not in log


def test_a_second_sigint_stops_at_once_and_harms_nothing(recipe, straight):
    changes = {"training.max_steps": 5, "training.save_steps": 1}
    reference, path = straight(**changes), recipe(**changes)
    folder, process = path.parent / "run", start(path.parent, "train", path, pause=1.0)
    while not (folder / "checkpoints" / "step-000001").is_dir():
        assert process.is_alive()
        time.sleep(0.01)
    for _ in range(2):  # both in the pause of step 2
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    assert [line["step"] for line in metrics_of(folder)] == [1], "it did not wait for the end of the step"
    assert printed(path.parent) == "error: interrupted\n"
    observer = Observer()
    run(path, observer)
    assert observer.done == [2, 3, 4, 5]
    assert result_of(folder) == result_of(reference)
    assert metrics_of(folder) == metrics_of(reference)


def test_a_second_process_is_refused_while_the_first_lives_and_a_kill_frees_the_folder(recipe, lora):
    path = recipe(**{"training.max_steps": 8, "training.save_steps": 1})
    folder, process = path.parent / "run", start(path.parent, "train", path, pause=0.2)
    wait_for_step(folder, 1, process)
    refused = lora("train", path)
    assert refused.code == 7, refused.err
    process.kill()
    assert finish(process) == -signal.SIGKILL
    assert lora("train", path).code == 0
    assert [line["step"] for line in metrics_of(folder)] == list(range(1, 9))


def survive(path: Path, kills: int, seed: int) -> int:
    """Start the run again and again, kill it at random instants, let it end; returns how many kills hit it alive.

    Every other kill waits for a step to finish, so that a slow machine gets on too.
    """
    delays, metrics, hits = random.Random(seed), path.parent / "run" / "metrics.jsonl", 0
    for number in range(kills):
        size = metrics.stat().st_size if metrics.is_file() else 0
        process = start(path.parent, "train", path)
        while number % 2 and process.is_alive() and not (metrics.is_file() and metrics.stat().st_size > size):
            time.sleep(0.002)
        process.join(delays.uniform(0.0, 0.15 if number % 2 else 0.6))
        process.kill()
        code = finish(process)
        hits += code == -signal.SIGKILL
        if code == 0:
            return hits
    process = start(path.parent, "train", path)
    assert finish(process) == 0, printed(path.parent)
    return hits


STORM = BUSY | {"training.max_steps": 80, "training.save_steps": 1, "training.logging_steps": 1}


def test_killed_at_random_instants_it_ends_in_the_same_bytes(recipe, straight):
    reference, path = straight(**STORM), recipe(**STORM)
    assert survive(path, kills=8, seed=1) >= 3
    assert result_of(path.parent / "run") == result_of(reference)
    assert metrics_of(path.parent / "run") == metrics_of(reference)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_many_times_it_ends_in_the_same_bytes(recipe, straight, seed):
    changes = STORM | {"training.max_steps": 200}
    reference, path = straight(**changes), recipe(**changes)
    assert survive(path, kills=40, seed=seed) >= 3
    assert result_of(path.parent / "run") == result_of(reference)
    assert metrics_of(path.parent / "run") == metrics_of(reference)
