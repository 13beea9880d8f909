"""A training run on the screen: what begins, how it goes, what came of it."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lora_cli.adapters.backbone import LoftQReport, read_report
from lora_cli.commands.autosize import Choice
from lora_cli.commands.output import OutputFolder
from lora_cli.commands.plan import Plan
from lora_cli.commands.train import Outcome
from lora_cli.fusion.network import Network
from lora_cli.report.console import facts, table
from lora_cli.report.curve import draw_curve, is_logarithmic
from lora_cli.report.numbers import duration, number, plural, size
from lora_cli.report.plan import plan_facts
from lora_cli.tasks import Metrics
from lora_cli.training.checkpoint import State
from lora_cli.training.loop import Step
from lora_cli.training.metrics import Line


class Silence:
    """Watches and says nothing: what ``--json`` wants."""

    def begins(self, plan: Plan, output: OutputFolder, state: State, set_aside: Path | None) -> None: ...

    def quantized(self, done: int, total: int) -> None: ...

    def network(self, network: Network) -> None: ...

    def micro_batch(self, choice: Choice) -> None: ...

    def step(self, step: Step, state: State) -> None: ...

    def line(self, line: Line) -> None: ...

    def evaluation_begins(self, rows: int) -> None: ...

    def evaluation_advances(self, rows: int) -> None: ...

    def evaluation_ends(self, step: int, metrics: Metrics | None) -> None: ...

    def saved(self, step: int) -> None: ...

    def close(self) -> None: ...


class TrainingScreen(Silence):
    """A start block, then a moving bar on a terminal, a line now and then in a pipe."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total = 0
        self.bar: Progress | None = None
        self.steps = self.rows = TaskID(0)
        self.layers: Progress | None = None

    def quantized(self, done: int, total: int) -> None:
        """A terminal shows how far it is: large layers take seconds each."""
        if self.console.is_terminal and self.layers is None:
            self.layers = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed} of {task.total} layers"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.layers.add_task("quantizing", total=total)
            self.layers.start()
        if self.layers is not None:
            self.layers.update(TaskID(0), completed=done)
            if done == total:
                self.layers.stop()

    def begins(self, plan: Plan, output: OutputFolder, state: State, set_aside: Path | None) -> None:
        self.total = plan.total_steps
        report = read_report(output.backbone) if plan.has_backbone else None
        more = [("loftq", _what_was_lost(report))] if report is not None else []
        facts(self.console, plan_facts(plan, _where_it_stands(plan, state, set_aside)) + more)
        self.console.print()
        if self.console.is_terminal and state.step < self.total and not state.stopped_early:
            self.bar = _progress(self.console)
            self.steps = self.bar.add_task("training", total=self.total, completed=state.step, figures="")
            self.rows = self.bar.add_task("evaluating", total=None, visible=False, figures="")
            self.bar.start()

    def network(self, network: Network) -> None:
        """Only what is slower than it might be is worth a line."""
        if network.notes:
            facts(self.console, [("note", note) for note in network.notes])

    def micro_batch(self, choice: Choice) -> None:
        rows = plural(choice.steps.micro_batch_size, "row")
        self.console.print(f"micro-batch  {rows} (auto: {size(choice.peak)} of {size(choice.limit)})")
        if choice.peak > choice.limit:
            facts(self.console, [("note", "that is more memory than there is: the system may end the run")])

    def step(self, step: Step, state: State) -> None:
        if self.bar is not None:
            speed = step.num_tokens / step.seconds
            text = f"loss {step.loss:.4f}  lr {step.learning_rate:.1e}  {speed:,.0f} tok/s"
            self.bar.update(self.steps, completed=step.number, figures=text)

    def line(self, line: Line) -> None:
        if self.bar is None:
            self.console.print(
                f"step {line['step']}/{self.total}  epoch {line['epoch']:.2f}  loss {line['loss']:.4f}  "
                f"lr {line['learning_rate']:.2e}  grad norm {line['grad_norm']:.3f}  "
                f"{line['tokens_per_second']:,.0f} tok/s"
            )

    def evaluation_begins(self, rows: int) -> None:
        if self.bar is not None:
            self.bar.update(self.rows, total=rows, completed=0, visible=True)

    def evaluation_advances(self, rows: int) -> None:
        if self.bar is not None:
            self.bar.advance(self.rows, rows)

    def evaluation_ends(self, step: int, metrics: Metrics | None) -> None:
        if self.bar is not None:
            self.bar.update(self.rows, visible=False)
        if metrics is not None:
            figures = "  ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in metrics.items())
            when = "before training" if step == 0 else f"after step {step}"
            self.console.print(f"{when}: {figures}")

    def close(self) -> None:
        for bar in (self.bar, self.layers):
            if bar is not None:
                bar.stop()
            self.bar = None


def _where_it_stands(plan: Plan, state: State, set_aside: Path | None) -> str:
    if set_aside is not None:
        return f"fresh; the earlier run is in {set_aside.name}"
    if state.step == 0:
        return "fresh"
    if state.step == plan.total_steps or state.stopped_early:
        return f"finished after step {state.step}"
    return f"resuming after step {state.step} of {plan.total_steps}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        refresh_per_second=4,
    )


def show_outcome(console: Console, outcome: Outcome) -> None:
    """The last screen: before and after, the curve, the files, and what to type next."""
    summary = outcome.summary
    if outcome.already_finished:
        console.print("this run is finished already; type --fresh to train again", style="bold")
    if summary.after:
        console.print()
        _show_before_after(console, outcome)
    _show_curve(console, outcome)
    console.print()
    facts(console, _closing_facts(outcome))
    console.print()
    facts(console, _next_commands(outcome))


def _show_before_after(console: Console, outcome: Outcome) -> None:
    summary = outcome.summary
    made = table("held-out rows", "before", "after", right=(1, 2))
    for name, after in summary.after.items():
        before = summary.before.get(name)
        made.add_row(name.replace("_", " "), "" if before is None else number(before), number(after))
    console.print(made)
    if summary.best_step != summary.steps:
        console.print(f"after step {summary.best_step}, the best {summary.metric_for_best_model.replace('_', ' ')}")
    if summary.stopped_early:
        console.print(f"stopped early after step {summary.steps} of {summary.total_steps}")


def _show_curve(console: Console, outcome: Outcome) -> None:
    points = [(line["step"], line["loss"]) for line in outcome.lines if "loss" in line]
    lines = draw_curve(points)
    if lines:
        scale = " (logarithmic)" if is_logarithmic([loss for _, loss in points]) else ""
        console.print(f"\ntraining loss by step{scale}", style="bold")
        console.print("\n".join(lines))


def _closing_facts(outcome: Outcome) -> list[tuple[str, str]]:
    summary, output = outcome.summary, outcome.output
    most = f" in the largest of {summary.processes} processes" if summary.processes > 1 else ""
    return [
        (
            "took",
            f"{duration(summary.train_seconds)} for {plural(summary.steps, 'step')}; "
            f"{summary.tokens_per_second:,.0f} tokens/s, peak memory {size(summary.peak_memory_bytes)}{most}",
        ),
        ("adapter" if output.method == "lora" else "model", os.fspath(output.result)),
        ("figures", f"{output.summary}, {output.metrics}"),
    ]


def _next_commands(outcome: Outcome) -> list[tuple[str, str]]:
    output = outcome.output
    if output.method != "lora":
        return [("next", f"load {output.result} with transformers, like any model folder")]
    return [
        ("next", f"lora merge {output.result} -o {output.root / 'merged'}"),
        ("", f"lora count-params {output.result}"),
    ]


def _what_was_lost(report: LoftQReport) -> str:
    """Of the weights, by quantizing them: alone, and with the adapter that makes up for it."""
    turns = plural(report.iterations, "turn")
    share = max(report.kept, default=1.0)
    return (
        f"{report.bits} bits, {turns}: quantized, the weights are off by {report.plain:.2%} of their norm, with the "
        f"adapter by {report.loftq:.2%} (median of {plural(len(report.errors), 'module')}; none by more than "
        f"{share:.0%} of the former)"
    )
