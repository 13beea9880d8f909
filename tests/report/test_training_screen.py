"""What a person sees of a training run, in a pipe and on a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from lora_cli.commands.train import Outcome, train
from lora_cli.errors import NonFiniteError
from lora_cli.recipe import load_recipe
from lora_cli.report.numbers import number
from lora_cli.report.training import TrainingScreen, show_outcome
from lora_cli.training import run as run_module
from tests.conftest import labelled_rows, write_jsonl
from tests.terminal import Terminal


class Screen:
    """A console that remembers."""

    def __init__(self, terminal: bool) -> None:
        self.file = io.StringIO()
        self.console = Console(
            file=self.file, force_terminal=terminal, width=140, highlight=False, emoji=False, markup=False
        )

    @property
    def text(self) -> str:
        """All that was written, without colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.text.splitlines()]


@pytest.fixture
def show(recipe) -> Callable[..., tuple[Screen, Outcome]]:
    def go(terminal: bool = False, **changes: Any) -> tuple[Screen, Outcome]:
        screen = Screen(terminal)
        watching = TrainingScreen(screen.console)
        try:
            outcome = train(load_recipe(recipe(**changes)), watching)
        finally:
            watching.close()
        show_outcome(screen.console, outcome)
        return screen, outcome

    return go


def test_a_pipe_gets_a_line_for_every_line_of_metrics_with_its_figures(show):
    screen, outcome = show(**{"training.logging_steps": 2})
    shown = [line for line in screen.lines if line.startswith("step ") and "/4" in line]
    assert shown == [
        f"step {line['step']}/4  epoch {line['epoch']:.2f}  loss {line['loss']:.4f}  "
        f"lr {line['learning_rate']:.2e}  grad norm {line['grad_norm']:.3f}  {line['tokens_per_second']:,.0f} tok/s"
        for line in outcome.lines
    ]
    assert len(shown) == 3


def test_evaluations_are_told_before_training_and_after_their_steps(show):
    screen, outcome = show(**{"dataset.eval_size": 4, "training.eval_steps": 2})
    told = [line for line in screen.lines if re.match(r"(before training|after step \d+): ", line)]
    figures = [line for line in outcome.lines if "eval_loss" in line]
    assert [line.split(":")[0] for line in told] == ["before training", "after step 2", "after step 4"]
    for line, values in zip(told, figures, strict=True):
        assert f"loss {number(values['eval_loss'])}  perplexity {number(values['eval_perplexity'])}" in line


def test_the_start_block_says_what_will_happen(show, model_folder, tmp_path):
    screen, outcome = show(**{"dataset.eval_size": 4, "training.gradient_accumulation_steps": 2})
    block = screen.lines[: screen.lines.index("")]
    facts = {line.split("  ")[0]: line.partition("  ")[2].strip() for line in block}
    counted, counts = outcome.plan.model.counted, outcome.plan.dataset.train_counts
    assert facts["model"] == f"{model_folder('llama')} (llama, float32 on cpu)"
    percent = 100 * counted.trainable / counted.total
    assert facts["parameters"] == f"{counted.trainable:,} trained of {counted.total:,} ({percent:.4f} %)"
    names = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    assert facts["adapter"] == f"r 4 on 14 modules ({names}); scale 2 (lora_alpha / r)"
    assert facts["rows"] == f"20 rows to train on, 4 held out; read as messages from {tmp_path / 'rows.jsonl'}"
    assert facts["tokens"].startswith(f"{counts.tokens:,}, {counts.targets:,} of them supervised; longest row ")
    assert facts["step"] == "8 rows (4 in a micro-batch x 2)"
    assert facts["run"] == "4 steps (1.3333 epochs of 3); learning rate 0.01, linear, 1 step of warm-up"
    assert facts["output"] == f"{tmp_path / 'run'} (fresh)"


def test_the_last_screen_shows_before_and_after_of_the_delivered_adapter(show):
    screen, outcome = show(**{"dataset.eval_size": 4})
    summary, start = outcome.summary, screen.lines.index(next(x for x in screen.lines if x.startswith("held-out rows")))
    assert screen.lines[start].split() == ["held-out", "rows", "before", "after"]
    shown = [line.rsplit(maxsplit=2) for line in screen.lines[start + 1 : start + 5]]
    assert shown == [
        [name.replace("_", " "), number(summary.before[name]), number(summary.after[name])]
        for name in ("loss", "perplexity", "token_accuracy", "exact_match")
    ]


def test_the_last_screen_names_the_files_and_the_next_commands(show, tmp_path):
    screen, _ = show()
    folder = tmp_path / "run"
    assert f"adapter  {folder / 'adapter'}" in screen.lines
    assert f"figures  {folder / 'summary.json'}, {folder / 'metrics.jsonl'}" in screen.lines
    assert f"next  lora merge {folder / 'adapter'} -o {folder / 'merged'}" in screen.lines
    assert f"      lora count-params {folder / 'adapter'}" in screen.lines
    assert any(
        re.fullmatch(r"took     0:00:0\d for 4 steps; [\d,]+ tokens/s, peak memory [\d.]+ [MG]B", x)
        for x in screen.lines
    )


def test_the_next_commands_can_be_typed(show, lora):
    screen, _ = show()
    for line in screen.lines:
        if (found := line.find("lora ")) >= 0 and line.startswith(("next", "      lora")):
            assert lora(*line[found:].split()[1:]).code == 0


def test_the_curve_of_the_training_loss_is_drawn_from_every_line(show):
    screen, outcome = show(**{"training.max_steps": 6})
    losses = [line["loss"] for line in outcome.lines]
    start = screen.lines.index("training loss by step")
    assert screen.lines[start + 1].lstrip().startswith(f"{max(losses):.4g} │")
    assert screen.lines[start + 8].lstrip().startswith(f"{min(losses):.4g} │")
    assert screen.lines[start + 10].split() == ["1", "6"]


def scripted(monkeypatch: pytest.MonkeyPatch, *losses: float) -> dict[str, Any]:
    left = iter(losses)
    monkeypatch.setattr(run_module, "evaluate", lambda *rows, **options: {"loss": next(left)})
    return {"dataset.eval_size": 4, "training.eval_steps": 1}


def test_where_the_best_is_not_the_last_it_says_which_step_is_delivered(show, monkeypatch):
    screen, _ = show(**scripted(monkeypatch, 9.0, 3.0, 2.0, 4.0, 5.0))
    assert "after step 2, the best eval loss" in screen.lines
    assert ["loss", "9", "2"] in [line.split() for line in screen.lines]
    monkeypatch.undo()


def test_a_run_that_stopped_early_says_so(show, monkeypatch):
    screen, _ = show(**scripted(monkeypatch, 9.0, 3.0, 4.0), **{"training.early_stopping_patience": 1})
    assert "stopped early after step 2 of 4" in screen.lines


def test_a_finished_run_says_so_and_shows_its_figures_again(show):
    first, _ = show()
    again, _ = show()
    assert "this run is finished already; type --fresh to train again" in again.lines
    assert not any(line.startswith("step 1/") for line in again.lines)
    curve = first.lines[first.lines.index("training loss by step") :][:11]
    assert again.lines[again.lines.index("training loss by step") :][:11] == curve


def test_a_baseline_says_how_its_model_is_loaded(show, tmp_path):
    screen, _ = show(method="full", lora={})
    folder = tmp_path / "run" / "model"
    assert f"model    {folder}" in screen.lines
    assert f"next  load {folder} with transformers, like any model folder" in screen.lines


def test_a_classifier_shows_its_labels_and_its_own_metrics(show, tmp_path):
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(16))
    screen, _ = show(task="sequence_classification", **{"dataset.path": str(rows), "dataset.eval_size": 4})
    assert any(re.fullmatch(r"labels +0, 1", line) for line in screen.lines)
    assert any(line.startswith("matthews correlation ") for line in screen.lines)


# --- a terminal -----------------------------------------------------------------------------------------------


def test_a_terminal_gets_a_moving_bar_instead_of_lines(show):
    screen, outcome = show(terminal=True, **{"dataset.eval_size": 4})
    assert not any(re.match(r"step \d+/4 ", line) for line in screen.lines)
    assert "training" in screen.text
    assert "4/4" in screen.text
    assert f"loss {outcome.lines[-2]['loss']:.4f}" in screen.text
    assert "before training: loss " in screen.text
    assert "\x1b[?25h" in screen.file.getvalue(), "the cursor is shown again"


def test_a_run_that_fails_gives_the_cursor_back(recipe):
    screen = Screen(terminal=True)
    watching = TrainingScreen(screen.console)
    path = recipe(**{"training.learning_rate": 1e30, "training.warmup_steps": 0})
    with pytest.raises(NonFiniteError):
        train(load_recipe(path), watching)
    assert screen.file.getvalue().rfind("\x1b[?25l") > screen.file.getvalue().rfind("\x1b[?25h")
    watching.close()
    assert screen.file.getvalue().rfind("\x1b[?25l") < screen.file.getvalue().rfind("\x1b[?25h")
    watching.close()


def test_text_of_the_user_is_never_taken_for_markup(show, tmp_path):
    """A folder called [bold] is a folder, and :smile: is no emoji."""
    for terminal in (False, True):
        folder = tmp_path / f"[bold]:smile:[red]{terminal}"
        screen, _ = show(terminal=terminal, output_dir=str(folder))
        assert "[bold]:smile:[red]" in screen.text.replace("\n", "")


def test_a_whole_run_in_a_terminal_has_a_moving_bar_and_ends(recipe, tmp_path):
    """The bar takes standard output's place while it moves: what is printed must reach the terminal all the same."""
    path = recipe(**{"training.max_steps": 6, "dataset.eval_size": 4})
    terminal = Terminal("train", path, folder=tmp_path)
    terminal.read_until(None)
    assert terminal.finish() == 0, terminal.shown[-2000:]
    assert re.search(r"training .* 6/6 loss", terminal.shown)
    assert "lora merge" in terminal.shown
    assert "\x1b[?25l" in terminal.written, "the bar hides the cursor"
    assert terminal.written.endswith("\n")
    assert "\x1b[?25h" in terminal.written, "and shows it again"
