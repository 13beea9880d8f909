"""metrics.jsonl and the trackers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_cli.errors import StorageError, UsageError
from lora_cli.training.metrics import TRACKERS, MetricsFile, build_trackers, check_trackers


def test_lines_are_written_one_object_a_line_and_read_back(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    lines = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "eval_loss": 1e-300}]
    for line in lines:
        metrics.write(line)
    assert [json.loads(text) for text in metrics.path.read_text().splitlines()] == lines
    assert metrics.read() == lines
    assert metrics.size == metrics.path.stat().st_size


def test_a_resumed_run_cuts_off_what_came_after_its_checkpoint(tmp_path):
    first = MetricsFile(tmp_path / "metrics.jsonl")
    first.write({"step": 1})
    size = first.size
    first.write({"step": 2})
    resumed = MetricsFile(first.path, keep_bytes=size)
    resumed.write({"step": 2, "again": True})
    assert resumed.read() == [{"step": 1}, {"step": 2, "again": True}]


def test_a_run_from_the_beginning_starts_an_empty_file(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").write({"step": 1})
    assert MetricsFile(tmp_path / "metrics.jsonl").read() == []


def test_a_file_that_is_shorter_than_the_checkpoint_says_is_not_padded(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").write({"step": 1})
    resumed = MetricsFile(tmp_path / "metrics.jsonl", keep_bytes=10_000)
    resumed.write({"step": 2})
    assert resumed.read() == [{"step": 1}, {"step": 2}]


def test_a_full_disk_is_a_storage_error_with_a_cure(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.path.unlink()
    metrics.path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl: No space left") as caught:
        metrics.write({"step": 1})
    assert "free some space and type the same command again" in str(caught.value)


def test_tensorboard_scalars_read_back_as_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = build_trackers(["tensorboard"], tmp_path, {})
    tracker.log(3, {"loss": 2.5, "learning_rate": 0.125})
    tracker.log(4, {"loss": 1.25})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5), (4, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("learning_rate")] == [(3, 0.125)]


def test_tensorboard_hides_what_a_resumed_run_did_twice(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for after, values in [(0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 20.0, 3: 30.0})]:  # killed after step 3, saved at 1
        (tracker,) = build_trackers(["tensorboard"], tmp_path, {}, after)
        for step, value in values.items():
            tracker.log(step, {"loss": value})
        tracker.close()
        for path in (tmp_path / "tensorboard").glob("events*"):  # they are read in the order of their names
            path.rename(path.with_name(f"{after}.tfevents"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0), (3, 30.0)]


class FakeTracker(SimpleNamespace):
    """What wandb and trackio have in common, noting every call."""

    def __init__(self) -> None:
        super().__init__(calls=[])

    def init(self, **arguments):
        self.calls.append(("init", arguments))

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_are_told_the_recipe_every_value_and_the_end(name, monkeypatch, tmp_path):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, name, fake)
    (tracker,) = build_trackers([name], tmp_path / "my-run", {"task": "causal_lm"})
    tracker.log(3, {"loss": 2.5})
    tracker.close()
    assert fake.calls == [
        ("init", {"project": "lora", "name": "my-run", "config": {"task": "causal_lm"}}),
        ("log", 3, {"loss": 2.5}),
        ("finish",),
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_cannot_start_is_the_users_to_mend_not_a_bug(name, monkeypatch, tmp_path):
    fake = FakeTracker()

    def init(**arguments):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.\nmore")

    fake.init = init
    monkeypatch.setitem(sys.modules, name, fake)
    with pytest.raises(UsageError, match=rf"training\.report_to: {name} cannot start: No API key configured"):
        build_trackers([name], tmp_path, {})


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_a_tracker_that_is_not_installed_is_refused_with_the_pip_command(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)  # what Python does where an import failed
    with pytest.raises(UsageError, match=f"training.report_to: {name} is not installed") as caught:
        check_trackers([name])
    assert f"pip install 'lora-cli[{name}]'" in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_tracker_of_the_recipe_exists():
    from lora_cli.recipe.types import Trackers

    assert set(Trackers) == set(TRACKERS)


def test_every_tracker_is_an_extra_that_pip_knows():
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert set(TRACKERS) <= set(project["optional-dependencies"])
    assert project["name"] == "lora-cli"
