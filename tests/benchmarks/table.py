"""Measured figures as tables: the same ones on the screen and, as markdown, in the README."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.figures import Spread, Values, ratios, scaled
from tests.benchmarks.products import BY_ITSELF, WITH_SMALLER, card_peak

OURS = "lora"
MARK = "bench"
QUIET = 0.5  # the load of a machine on which timings mean something


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    figures: bool = True  # its columns but the first are numbers, and stand on the right

    def markdown(self) -> str:
        lines = [self.columns, ("---", *("---:" if self.figures else "---" for _ in self.columns[1:])), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(document: dict[str, Any]) -> list[Table]:
    """Everything that a run of the program measured, in the order of its JSON document."""
    found = []
    for name, section in document["shapes"].items():
        if "missing" not in section:
            found.append(training_table(name, section, document["machine"]))
        if section.get("ablations"):
            found.append(ablation_table(name, section))
    if document.get("other"):
        found.append(other_table(document["other"]))
    missing = {name: section["missing"] for name, section in document["shapes"].items() if "missing" in section}
    missing |= document.get("unavailable", {})
    if missing:
        found.append(Table("Not in these tables", ("what", "why"), list(missing.items()), figures=False))
    return found


def training_table(name: str, section: dict[str, Any], machine: dict[str, Any]) -> Table:
    """A column says nothing where the figures it is made of do not exist."""
    columns = ["real tokens/s", "of the limit", "lora is faster by", "peak GB", "above the base GB"]
    if machine["cuda"]:
        columns.append("FLOP utilisation")
    contenders, limit = section["contenders"], section["limit"]
    made = Table(f"{name}: {section['title']}", ("contender", *columns))
    ours = _values(contenders.get(OURS), "tokens_per_second")
    for contender, result in contenders.items():
        if isinstance(result, str):
            made.rows.append((contender, result, *[""] * (len(columns) - 1)))
            continue
        speed = result["tokens_per_second"]
        cells = [
            Spread.of(speed).text(0),
            _share(speed, _values(limit, "tokens_per_second")),
            _ratio(ours, speed) if contender != OURS else "",
            Spread.of(scaled(result["peak_bytes"], 1e-9)).text(),
            Spread.of(scaled(result["above_base_bytes"], 1e-9)).text(),
        ]
        if machine["cuda"]:
            cells.append(_utilisation(speed, section["model_flops_per_token"], machine["device"]))
        made.rows.append((contender, *cells))
    made.rows.extend(_limit_rows(limit, len(columns)))
    return made


def _values(result: dict[str, Values] | str | None, key: str) -> Values | None:
    return result[key] if isinstance(result, dict) and key in result else None


def _share(speed: Values, limit: Values | None) -> str:
    both = _same_rounds(speed, limit)
    return Spread.of(scaled(ratios(*both), 100)).text(0) + " %" if both else ""


def _ratio(ours: Values | None, theirs: Values) -> str:
    both = _same_rounds(ours, theirs)
    return Spread.of(ratios(*both)).text() + " x" if both else ""


def _times(values: Values) -> str:
    return Spread.of(values).text() + " x"


def _same_rounds(these: Values | None, those: Values | None) -> tuple[Values, Values] | None:
    """Both, where both have a value of every round; a contender that failed in one has no ratio at all."""
    return (these, those) if these and those and len(these) == len(those) else None


def _utilisation(speed: Values, flops_per_token: float, device: str) -> str:
    peak = card_peak(device)
    return "unknown card" if peak is None else Spread.of(scaled(speed, 100 * flops_per_token / peak)).text(1) + " %"


def _limit_rows(limit: dict[str, Values] | str, columns: int) -> list[tuple[str, ...]]:
    name = "the limit: matrix products alone"
    if isinstance(limit, str):
        return [(name, limit, *[""] * (columns - 1))]
    tera = Spread.of(scaled(limit["flops_per_second"], 1e-12)).text() + " TFLOP/s"
    rows = [(name, Spread.of(limit["tokens_per_second"]).text(0), tera)]
    if smaller := _values(limit, WITH_SMALLER):
        share = _share(smaller, limit["tokens_per_second"])
        rows.append(("the same, and the products of adapters and attention", Spread.of(smaller).text(0), share))
    if BY_ITSELF in limit:
        rows.append(("the same products as torch multiplies by itself", Spread.of(limit[BY_ITSELF]).text(0), ""))
    return [(*row, *[""] * (columns - 2)) for row in rows]


def ablation_table(name: str, section: dict[str, Any]) -> Table:
    """What each idea pays that is left out, or would pay that is added."""
    columns = ("the change", "real tokens/s", "lora is faster by", "peak GB")
    made = Table(f"{name}: ours with one thing changed", columns)
    ours = _values(section["contenders"].get(OURS), "tokens_per_second")
    for variant, result in {OURS: section["contenders"].get(OURS), **section["ablations"]}.items():
        if not isinstance(result, dict):
            made.rows.append((variant, result or "not measured", "", ""))
            continue
        speed = result["tokens_per_second"]
        beside = _values(result, "times_ours")  # in one process, step by step
        paid = "" if variant == OURS else _times(beside) if beside else _ratio(ours, speed)
        made.rows.append(
            (variant, Spread.of(speed).text(0), paid, Spread.of(scaled(result["peak_bytes"], 1e-9)).text())
        )
    return made


def other_table(other: dict[str, Any]) -> Table:
    made = Table("Other work", ("what", "unit", "median (least-most)"), figures=False)
    for what, found in other.items():
        if isinstance(found, str):
            made.rows.append((what, "", found))
            continue
        unit, values = found
        made.rows.append((what, unit, Spread.of(values).text(2 if unit == "s" else 0)))
    return made


def heading(document: dict[str, Any]) -> str:
    """Where the figures come from, in a sentence."""
    machine, rounds = document["machine"], document["rounds"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version[0].isdigit())
    device = f"{machine['device']}, " if machine["cuda"] else ""
    many = f"medians of {rounds} rounds, least and most in brackets" if rounds > 1 else "one round"
    busy = (
        f" Others were at work (load {machine['load_before']:.1f}): doubtful." if machine["load_before"] > QUIET else ""
    )
    command = f"`{document['command']}`: " if "command" in document else ""
    return f"{command}{device}{machine['cpu']}, {machine['cores']} cores; {versions}; {many}.{busy}"


def markdown(documents: list[dict[str, Any]]) -> str:
    """One or more runs of the program, as the README shows them."""
    return "\n\n".join(
        "\n\n".join([heading(document), *(table.markdown() for table in tables(document))]) for document in documents
    )


def put_between_marks(path: Path, text: str) -> None:
    """Write tables into a file, between the comments made for them."""
    before = path.read_text(encoding="utf-8")
    pattern = rf"<!-- {MARK} -->.*<!-- /{MARK} -->"
    after, count = re.subn(pattern, lambda _: f"<!-- {MARK} -->\n{text}\n<!-- /{MARK} -->", before, flags=re.DOTALL)
    if not count:
        raise SystemExit(f"error: {path} has no <!-- {MARK} --> ... <!-- /{MARK} -->")
    path.write_text(after, encoding="utf-8")
