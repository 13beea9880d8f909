"""A finished merge on the screen."""

from __future__ import annotations

from rich.console import Console

from lora_cli.commands.agreement import Agreement
from lora_cli.commands.merge import MergeReport
from lora_cli.report.console import facts
from lora_cli.report.numbers import size


def show_merge(console: Console, report: MergeReport) -> None:
    """What was merged, and how far the result is from what was trained."""
    rows = [
        ("merged", f"{report.adapter} into {report.base}"),
        ("wrote", f"{report.output} ({size(report.bytes)}, {report.dtype})"),
    ]
    if report.quantization is not None:
        base = "the full base" if report.onto == "full" else "the base as the run saw it, dequantized"
        rows.append(("onto", f"{base}; trained on {report.quantization}"))
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
    facts(console, rows + _beside_quantized(report))


def _beside_quantized(report: MergeReport) -> list[tuple[str, str]]:
    """How far the merged model is from what was trained, where the base was quantized; and the other way."""
    merged, other = report.trained_agreement, report.other_way_agreement
    if merged is None or other is None:
        return []
    way = "dequantized" if report.onto == "full" else "full"
    return [
        ("trained", f"{report.quantization} base + adapter: mean KL {_figures(merged)}"),
        ("", f"with --onto {way}: mean KL {_figures(other)}"),
    ]


def _figures(found: Agreement) -> str:
    return f"{found.mean_kl:.2e} nats, same top 1 {100 * found.top1_agreement:.2f} %"
