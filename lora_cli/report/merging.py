"""A finished merge on the screen."""

from __future__ import annotations

from rich.console import Console

from lora_cli.commands.merge import MergeReport
from lora_cli.report.console import facts
from lora_cli.report.numbers import size


def show_merge(console: Console, report: MergeReport) -> None:
    """What was merged, and how far the result is from what was trained."""
    rows = [
        ("merged", f"{report.adapter} into {report.base}"),
        ("wrote", f"{report.output} ({size(report.bytes)}, {report.dtype})"),
    ]
    figures = report.agreement
    if figures is None or report.limit_mean_kl is None or report.adapter_mean_kl is None:
        rows.append(("compared", "not compared (--no-verify)"))
    else:
        rows += [
            ("compared", f"base + adapter with the merged model, {figures.positions} positions of {report.rows}"),
            ("logits", f"differ by at most {figures.max_abs_difference:.3g}"),
            ("mean KL", f"{figures.mean_kl:.2e} nats, limit {report.limit_mean_kl:.1e}"),
            ("", f"(the adapter itself moves the base by {report.adapter_mean_kl:.2e} nats)"),
            ("same top 1", f"{100 * figures.top1_agreement:.2f} %"),
        ]
    facts(console, rows)
