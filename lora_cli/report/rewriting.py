"""A shrunk, combined or exported adapter on the screen."""

from __future__ import annotations

from rich.console import Console

from lora_cli.commands.combine import CombineReport
from lora_cli.commands.export import ExportReport
from lora_cli.commands.shrink import ModuleShrink, ShrinkReport
from lora_cli.report.console import facts, table
from lora_cli.report.grouping import grouped
from lora_cli.report.numbers import number, plural


def show_shrink(console: Console, report: ShrinkReport) -> None:
    """One row a kind of module: rank before and after, energy kept."""
    facts(
        console,
        [
            ("shrunk", report.adapter),
            ("wrote", report.output),
            ("parameters", f"{report.parameters:,} of {report.parameters_before:,}"),
            ("energy kept", f"{_percent(report.energy)} of the squared singular values of all updates"),
        ],
    )
    console.print()
    made = table("module", "count", "rank", "energy kept", right=(1,))
    for name, members in grouped(report.modules, lambda m: m.name, lambda m: (m.rank_before, m.rank)):
        made.add_row(name, str(len(members)), f"{members[0].rank_before} to {members[0].rank}", _energies(members))
    console.print(made)


def _energies(members: list[ModuleShrink]) -> str:
    least, most = (_percent(pick(member.energy for member in members)) for pick in (min, max))
    return least if least == most else f"{least} to {most}"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def show_combine(console: Console, report: CombineReport) -> None:
    """What was combined, how, and how far the result is from the plain sum."""
    parts = [f"{number(weight)} x {path}" for weight, path in zip(report.weights, report.adapters, strict=True)]
    density = f", density {number(report.density)}" if report.density is not None else ""
    seed = f", seed {report.seed}" if report.seed is not None else ""
    ranks = ", ".join(map(str, report.ranks))
    rows = [
        ("combined", "\n".join(parts)),
        ("method", f"{report.method}{density}{seed}"),
        ("wrote", f"{report.output} ({plural(report.modules, 'module')}, rank {ranks})"),
        ("parameters", f"{report.parameters:,}"),
    ]
    if report.distance_from_sum is not None:
        rows.append(("distance", f"{report.distance_from_sum:.3g} from the weighted sum of the updates, over its norm"))
    facts(console, rows)


def show_export(console: Console, report: ExportReport) -> None:
    """What was written, how far it is from what was trained, and what to type next."""
    rows = [
        ("exported", f"{report.adapter} for {report.server}"),
        (
            "wrote",
            f"{report.output} ({plural(report.modules, 'module')}, rank = alpha = {report.rank}, {report.dtype}; "
            f"re-read by {report.server}'s rules)",
        ),
        ("updates", f"differ by {report.distance:.2g}, relative to their norm"),
        *_logits(report),
    ]
    facts(console, rows)
    console.print()
    for command in report.commands:
        console.print(command, soft_wrap=True)


def _logits(report: ExportReport) -> list[tuple[str, str]]:
    figures = report.agreement
    if figures is None or report.limit_mean_kl is None or report.adapter_mean_kl is None:
        return [("logits", f"not compared: {report.not_compared}")]
    return [
        ("compared", f"base + adapter with base + export, {figures.positions} positions of {report.rows}"),
        ("logits", f"differ by at most {figures.max_abs_difference:.3g}"),
        ("mean KL", f"{figures.mean_kl:.2e} nats, limit {report.limit_mean_kl:.1e}"),
        ("", f"(the adapter itself moves the base by {report.adapter_mean_kl:.2e} nats)"),
    ]
