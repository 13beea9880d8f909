"""What happens between two steps: evaluations, the best adapter, saves, early stopping, requests to stop."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.commands import train as train_command
from lora_cli.commands.train import Outcome, train
from lora_cli.errors import NonFiniteError, Stopped
from lora_cli.recipe import load_recipe
from lora_cli.report.training import Silence
from lora_cli.training import run as run_module
from lora_cli.training.checkpoint import read_state
from tests.conftest import labelled_rows, write_jsonl


class Watcher(Silence):
    """Notes what happens; ``at`` is called after each step."""

    def __init__(self, at: Callable[[int], None] = lambda step: None) -> None:
        self.at = at
        self.steps: list[Any] = []
        self.saves: list[int] = []
        self.evaluations: list[tuple[int, bool]] = []
        self.rows: list[int] = []

    def step(self, step, state) -> None:
        self.steps.append(step)
        self.at(step.number)

    def evaluation_advances(self, rows) -> None:
        self.rows.append(rows)

    def evaluation_ends(self, step, metrics) -> None:
        self.evaluations.append((step, metrics is not None))

    def saved(self, step) -> None:
        self.saves.append(step)


def run(path: Path, watcher: Watcher | None = None) -> Outcome:
    return train(load_recipe(path), watcher or Watcher())


def evaluations(outcome: Outcome, name: str = "eval_loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in outcome.lines if name in line}


def logged(outcome: Outcome) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in outcome.lines if "loss" in line}


def kept(outcome: Outcome) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in outcome.output.checkpoints.iterdir())


def another(tmp_path: Path) -> str:
    """A second output folder, for a run to compare with."""
    return str(tmp_path / "another")


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("cadence", "expected"),
    [(2, [0, 2, 4, 6, 7]), (0.5, [0, 4, 7]), ("epoch", [0, 5, 7]), (100, [0, 7])],
)
def test_it_evaluates_before_the_first_step_on_its_cadence_and_at_the_end(recipe, cadence, expected):
    """18 of 24 rows in steps of 4 make an epoch of 5 steps."""
    outcome = run(recipe(**{"training.max_steps": 7, "training.eval_steps": cadence, "dataset.eval_size": 6}))
    assert list(evaluations(outcome)) == expected


@pytest.mark.parametrize(("cadence", "expected"), [(3, [3, 6, 7]), (0.5, [4, 7]), ("epoch", [6, 7]), (100, [7])])
def test_it_saves_on_its_cadence_and_at_the_end(recipe, cadence, expected):
    watcher = Watcher()
    outcome = run(recipe(**{"training.max_steps": 7, "training.save_steps": cadence}), watcher)
    assert watcher.saves == expected
    assert kept(outcome) == expected[-2:]


def test_a_line_of_metrics_is_the_mean_over_all_targets_since_the_line_before(recipe):
    watcher = Watcher()
    outcome = run(recipe(**{"training.max_steps": 8, "training.logging_steps": 3}), watcher)
    expected = {}
    for number, window in {1: [1], 3: [2, 3], 6: [4, 5, 6], 8: [7, 8]}.items():
        steps = [watcher.steps[index - 1] for index in window]
        targets = sum(step.num_targets for step in steps)
        expected[number] = sum(step.loss * step.num_targets for step in steps) / targets
    assert logged(outcome) == pytest.approx(expected, rel=1e-12)
    assert len({step.num_targets for step in watcher.steps[1:3]}) == 2, "a mean of means would be the same"


def test_a_line_of_metrics_holds_exactly_the_promised_figures(recipe):
    watcher = Watcher()
    outcome = run(recipe(**{"dataset.eval_size": 4}), watcher)
    line = next(line for line in outcome.lines if line["step"] == 2 and "loss" in line)
    assert line == {
        "step": 2,
        "epoch": 2 / 5,
        "loss": watcher.steps[1].loss,
        "learning_rate": watcher.steps[1].learning_rate,
        "grad_norm": watcher.steps[1].grad_norm,
        "tokens": watcher.steps[0].num_tokens + watcher.steps[1].num_tokens,
        "tokens_per_second": pytest.approx(watcher.steps[1].num_tokens / watcher.steps[1].seconds),
        "peak_memory_bytes": line["peak_memory_bytes"],
    }
    assert line["peak_memory_bytes"] > 1_000_000
    first = outcome.lines[0]
    assert set(first) == {"step", "epoch"} | {
        f"eval_{name}" for name in ("loss", "perplexity", "token_accuracy", "exact_match")
    }


def script(monkeypatch: pytest.MonkeyPatch, values: list[float], name: str = "loss") -> None:
    """Let the evaluations find these figures, the first one before training."""
    left = iter(values)

    def evaluate(*rows: Any, **options: Any) -> dict[str, float]:
        value = next(left)
        return {"loss": 1.0, name: value}

    monkeypatch.setattr(run_module, "evaluate", evaluate)


EVERY_STEP = {"training.eval_steps": 1, "dataset.eval_size": 6}


def test_a_run_whose_rate_is_far_too_large_delivers_the_adapter_that_did_best(recipe, tmp_path):
    """Nothing is scripted here: real losses that go up and down."""
    for rate in (0.05, 0.1, 0.2, 0.4):
        changes = {"training.learning_rate": rate, "training.lr_scheduler_type": "constant", "training.max_steps": 10}
        outcome = run(recipe(**changes, **EVERY_STEP, output_dir=str(tmp_path / f"rate-{rate}")))
        losses = evaluations(outcome)
        best = min(range(1, 11), key=losses.__getitem__)
        assert outcome.summary.best_step == best
        assert weights(outcome.output.result) == weights(outcome.output.checkpoints / f"step-{best:06d}")
        if best < 9:
            assert weights(outcome.output.result) != weights(outcome.output.checkpoints / "step-000010")
            return
    pytest.fail("with each of these rates the last adapter is the best")


@pytest.mark.parametrize("best", [1, 4, 5, 6])
def test_the_best_adapter_is_kept_beside_the_newest_two_and_is_the_one_delivered(recipe, monkeypatch, best):
    script(monkeypatch, [9.0] + [1.0 if step == best else 2.0 + step for step in range(1, 7)])
    outcome = run(recipe(**EVERY_STEP, **{"training.max_steps": 6, "training.save_steps": 1}))
    assert kept(outcome) == sorted({best, 5, 6})
    delivered = weights(outcome.output.result)
    assert delivered == weights(outcome.output.checkpoints / f"step-{best:06d}")
    assert (delivered == weights(outcome.output.checkpoints / "step-000006")) is (best == 6)


def test_an_improvement_is_saved_even_where_no_save_is_due(recipe, monkeypatch):
    script(monkeypatch, [9.0, 3.0, 4.0, 2.0, 5.0])
    watcher = Watcher()
    run(recipe(**EVERY_STEP, **{"training.save_steps": 100}), watcher)
    assert watcher.saves == [1, 3, 4]


def test_the_summary_maps_before_to_the_first_evaluation_and_after_to_the_best_one(recipe):
    outcome = run(recipe(**EVERY_STEP))
    summary = json.loads(outcome.output.summary.read_text())
    lines = {line["step"]: line for line in outcome.lines if "eval_loss" in line}
    for name in ("loss", "perplexity", "token_accuracy", "exact_match"):
        assert summary["before"][name] == lines[0][f"eval_{name}"]
        assert summary["after"][name] == lines[summary["best_step"]][f"eval_{name}"]
    assert summary["after"]["loss"] == min(evaluations(outcome)[step] for step in range(1, 5))
    assert summary["steps"] == summary["total_steps"] == 4
    assert summary["stopped_early"] is False
    assert summary["train_loss"] == logged(outcome)[4]
    assert summary["rows"] == {"train": 18, "eval": 6}
    assert summary["tokens"] == [line["tokens"] for line in outcome.lines if "tokens" in line][-1]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("eval_loss", [0.1, 3.0, 2.0, 4.0, 2.0], 2),
        ("eval_perplexity", [0.1, 3.0, 2.0, 4.0, 2.5], 2),
        ("eval_token_accuracy", [0.9, 0.3, 0.2, 0.4, 0.4], 3),
        ("eval_exact_match", [0.9, 0.3, 0.2, 0.4, 0.1], 3),
    ],
)
def test_the_best_is_the_lowest_loss_or_the_highest_accuracy_and_the_first_of_equals(
    recipe, monkeypatch, metric, values, best
):
    """What the untrained model reached does not count: there is no adapter to deliver for it."""
    script(monkeypatch, values, metric.removeprefix("eval_"))
    outcome = run(recipe(**EVERY_STEP, **{"training.metric_for_best_model": metric}))
    assert outcome.summary.best_step == best
    assert outcome.summary.after[metric.removeprefix("eval_")] == values[best]


@pytest.mark.parametrize(("patience", "expected"), [(1, 3), (2, 6), (3, 7)])
def test_it_stops_after_so_many_evaluations_in_a_row_without_improvement(recipe, monkeypatch, patience, expected):
    script(monkeypatch, [9.0, 5.0, 4.0, 4.0, 3.0, 3.5, 3.0, 3.1, 1.0, 1.0, 1.0])
    changes = {"training.max_steps": 10, "training.early_stopping_patience": patience}
    outcome = run(recipe(**EVERY_STEP, **changes))
    assert outcome.summary.stopped_early
    assert (outcome.summary.steps, outcome.summary.total_steps) == (expected, 10)
    assert list(evaluations(outcome)) == list(range(expected + 1))
    assert outcome.summary.best_step == (2 if patience == 1 else 4)
    assert kept(outcome)[-1] == expected


def test_a_run_stopped_early_is_finished_and_is_not_taken_up_again(recipe, monkeypatch):
    script(monkeypatch, [9.0, 5.0, 6.0])
    path = recipe(**EVERY_STEP, **{"training.early_stopping_patience": 1})
    assert run(path).summary.steps == 2
    again = run(path)
    assert again.already_finished
    assert again.summary.stopped_early


def test_a_run_whose_last_evaluation_exhausts_its_patience_did_not_stop_early(recipe, monkeypatch):
    script(monkeypatch, [9.0, 5.0, 4.0, 3.0, 4.0])
    outcome = run(recipe(**EVERY_STEP, **{"training.early_stopping_patience": 1}))
    assert outcome.summary.steps == outcome.summary.total_steps == 4
    assert outcome.summary.stopped_early is False


def test_without_evaluation_rows_the_last_adapter_is_delivered(recipe):
    outcome = run(recipe())
    assert outcome.summary.before == outcome.summary.after == {}
    assert outcome.summary.best_step is None
    assert weights(outcome.output.result) == weights(outcome.output.checkpoints / "step-000004")


def test_a_classifier_learns_and_reports_its_metrics_end_to_end(recipe, tmp_path):
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(24))
    outcome = run(
        recipe(
            task="sequence_classification",
            **{
                "dataset.path": str(rows),
                "dataset.eval_size": 6,
                "training.max_steps": 12,
                "training.metric_for_best_model": "eval_matthews_correlation",
            },
        )
    )
    assert set(outcome.summary.after) == {"loss", "accuracy", "macro_f1", "matthews_correlation"}
    assert outcome.summary.metric_for_best_model == "eval_matthews_correlation"
    values = evaluations(outcome, "eval_matthews_correlation")
    assert outcome.summary.after["matthews_correlation"] == max(v for step, v in values.items() if step)
    assert outcome.summary.after["accuracy"] * 6 == pytest.approx(round(outcome.summary.after["accuracy"] * 6))
    assert logged(outcome)[12] < logged(outcome)[1]
    saved = load_file(outcome.output.result / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in saved


def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns what makes one weight of the run's adapter NaN."""
    models: list[Any] = []
    original = train_command.build_model

    def build(*arguments: Any, **options: Any) -> Any:
        models.append(original(*arguments, **options))
        return models[-1]

    monkeypatch.setattr(train_command, "build_model", build)

    def now() -> None:
        with torch.no_grad():
            next(p for name, p in models[-1].named_parameters() if "lora_A" in name).fill_(float("nan"))

    return now


def test_an_adapter_that_turned_nan_stops_the_run_and_the_last_good_checkpoint_goes_on(recipe, tmp_path, monkeypatch):
    straight = weights(run(recipe(output_dir=another(tmp_path))).output.result)
    destroy = poison(monkeypatch)
    path = recipe(**{"training.save_steps": 2, "training.max_steps": 4})
    with pytest.raises(NonFiniteError, match=r"the loss is not finite; the update was not made.*rows\.jsonl:"):
        run(path, Watcher(lambda step: destroy() if step == 3 else None))
    folder = path.parent / "run"
    assert [entry.name for entry in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert not (folder / "adapter").exists()
    assert read_state(folder / "checkpoints" / "step-000002").step == 2
    outcome = run(path)
    assert outcome.summary.steps == 4
    assert weights(outcome.output.result) == straight


def test_an_evaluation_that_is_nan_stops_the_run_and_saves_nothing_of_it(recipe, monkeypatch):
    destroy = poison(monkeypatch)
    path = recipe(**{"training.save_steps": 1, "training.eval_steps": 2, "dataset.eval_size": 4})
    with pytest.raises(NonFiniteError, match="the evaluation loss after step 2 is not finite") as caught:
        run(path, Watcher(lambda step: destroy() if step == 2 else None))
    assert caught.value.exit_code == 3
    assert [entry.name for entry in (path.parent / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert run(path).summary.steps == 4


def test_a_rate_that_breaks_the_weights_stops_before_the_update_that_would_spread_it(recipe):
    watcher = Watcher()
    path = recipe(**{"training.learning_rate": 1e30, "training.warmup_steps": 0})
    with pytest.raises(NonFiniteError, match="not finite; the update was not made"):
        run(path, watcher)
    assert [step.number for step in watcher.steps] == [1]


def test_weights_that_are_not_finite_after_the_last_step_are_not_delivered(recipe):
    """A rate that overflows float32 breaks the weights in the update itself, after every check of the step."""
    path = recipe(**{"training.learning_rate": 1e39, "training.warmup_steps": 0, "training.max_steps": 1})
    with pytest.raises(NonFiniteError, match="the weights after step 1 are not finite"):
        run(path)
    assert not (path.parent / "run" / "checkpoints").exists()
    assert not (path.parent / "run" / "adapter").exists()


def interrupt(number: int = signal.SIGUSR1) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_lets_the_step_finish_saves_and_says_where_it_stopped(recipe):
    watcher = Watcher(lambda step: interrupt() if step == 2 else None)
    path = recipe()
    with pytest.raises(Stopped, match="stopped by SIGUSR1 after step 2 of 4; everything is saved") as caught:
        run(path, watcher)
    assert caught.value.exit_code == 128 + signal.SIGUSR1
    assert watcher.saves == [2]
    assert not (path.parent / "run" / "adapter").exists()


class StopInEvaluation(Watcher):
    """Sends a signal after the first batch of the evaluation that follows ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.wanted = step

    def evaluation_advances(self, rows) -> None:
        super().evaluation_advances(rows)
        if len(self.steps) == self.wanted:
            interrupt()


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_signal_during_an_evaluation_cuts_it_short_and_it_is_done_again(recipe, tmp_path, step):
    """At step 0, in the middle, and in the very last evaluation."""
    changes = {"training.eval_steps": 2, "dataset.eval_size": 10, "training.per_device_eval_batch_size": 2}
    straight = run(recipe(**changes, output_dir=another(tmp_path)))
    path, watcher = recipe(**changes), StopInEvaluation(step)
    with pytest.raises(Stopped, match=f"after step {step} of 4"):
        run(path, watcher)
    assert watcher.evaluations[-1] == (step, False)
    resumed = Watcher()
    outcome = run(path, resumed)
    assert resumed.evaluations[0] == (step, True)
    assert evaluations(outcome) == evaluations(straight)
    assert outcome.summary.before == straight.summary.before
    assert outcome.summary.after == straight.summary.after
    assert weights(outcome.output.result) == weights(straight.output.result)


def test_a_signal_during_the_last_step_of_a_run_without_evaluation_finishes_it(recipe):
    """Everything is done: there is nothing to resume."""
    outcome = run(recipe(), Watcher(lambda step: interrupt() if step == 4 else None))
    assert outcome.summary.steps == 4
    assert (outcome.output.result / "adapter_model.safetensors").is_file()
