"""Numbers as people read them."""

from __future__ import annotations

from lora_cli.adapters.patterns import ending


def number(value: float) -> str:
    """At most four decimals, without needless zeros: 0.9250 is 0.925, 12345.6 is 12,346."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4f}".rstrip("0").rstrip(".")


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def endings(names: list[str]) -> str:
    """The distinct last components, in order: q_proj, k_proj."""
    return ", ".join(dict.fromkeys(ending(name) for name in names))
