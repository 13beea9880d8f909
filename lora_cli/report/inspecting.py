"""What an adapter holds, on the screen."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lora_cli.commands.inspect import ALIVE, DEAD, NON_FINITE, Difference, Inspection, ModuleDifference, ModuleFacts
from lora_cli.report.console import facts, table
from lora_cli.report.grouping import grouped
from lora_cli.report.numbers import number, plural


def show_inspection(console: Console, found: Inspection) -> None:
    """The facts, one row a kind of module, what servers say, and the difference from the other adapter."""
    facts(console, _facts(found))
    console.print()
    _show_modules(console, found.modules)
    if found.use_dora:
        console.print("norms are those of s B A, before DoRA's magnitudes", style="dim")
    console.print()
    facts(console, [(verdict.server, str(verdict)) for verdict in found.servers])
    if found.difference is not None:
        console.print()
        _show_difference(console, found.difference)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    revision = f" at {found.revision}" if found.revision else ""
    kind = ("DoRA" if found.use_dora else "LoRA") + (", rank-stabilised" if found.use_rslora else "")
    rows = [
        ("adapter", f"{found.adapter} ({kind}, {found.task})"),
        ("base", f"{found.base or 'not named'}{revision}"),
        ("fingerprint", found.base_fingerprint or "unknown (not written by this tool)"),
        ("parameters", f"{found.parameters:,} ({', '.join(found.dtypes)}) on {plural(len(found.modules), 'module')}"),
    ]
    if found.norm is not None:
        rows.append(("norm", f"{number(found.norm)} (of all updates together)"))
    if found.saved:
        rows.append(("in full", ", ".join(found.saved)))
    for state, name in ((DEAD, "dead"), (NON_FINITE, "not finite")):
        if modules := found.in_state(state):
            rows.append((name, _some(modules)))
    return rows


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _show_modules(console: Console, modules: list[ModuleFacts]) -> None:
    made = table("module", "count", "A", "B", "scale", "norm", "effective rank", "", right=(1, 5, 6))
    likeness = lambda m: (m.rank, m.scaling, m.in_features, m.out_features, m.state)  # noqa: E731
    for name, members in grouped(modules, lambda m: m.name, likeness):
        one = members[0]
        made.add_row(
            name,
            str(len(members)),
            f"{one.rank} x {one.in_features}",
            f"{one.out_features} x {one.rank}",
            number(one.scaling),
            _span([m.norm for m in members]),
            _span([m.effective_rank for m in members]),
            "" if one.state == ALIVE else one.state,
        )
    console.print(made)


def _span(values: Sequence[float | None]) -> str:
    """Least to most."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    least, most = _short(min(known)), _short(max(known))
    return least if least == most else f"{least} to {most}"


def _short(value: float) -> str:
    return f"{value + 0.0:.4g}"


def _show_difference(console: Console, found: Difference) -> None:
    console.print(f"compared with {found.other}")
    if found.modules:
        made = table("module", "count", "cosine", "norm", "distance", right=(1, 2, 3, 4))
        for name, members in grouped(found.modules, lambda m: m.name, lambda m: m.cosine is None):
            made.add_row(name, str(len(members)), *_columns(members))
        console.print(made)
        console.print(
            "cosine of the updates; change of their norm; norm of their difference over that of this adapter's"
        )
    else:
        console.print("nothing can be compared: no module has an update of the same shape in both")
    for text, names in (
        ("only in this adapter", found.only_here),
        ("only in the other", found.only_there),
        ("of other shapes", found.unlike),
    ):
        if names:
            console.print(f"{text}: {_some(names)}")


def _columns(members: list[ModuleDifference]) -> tuple[str, str, str]:
    changes = [100 * m.norm_change for m in members if m.norm_change is not None]
    return _span([m.cosine for m in members]), f"{_span(changes)} %", _span([m.distance for m in members])
