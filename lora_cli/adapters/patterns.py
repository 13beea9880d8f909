"""Module names and the patterns that choose among them.

A pattern is a name ending in whole components (`q_proj`, `attention.self.query`), a glob over the whole name
(`*.layers.1?.*`), or a regular expression over the whole name (`re:.*layers\\.[0-3]\\..*`).
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable


def matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def is_wild(pattern: str) -> bool:
    """Whether it is more than a name or the ending of one."""
    return pattern.startswith("re:") or any(character in pattern for character in "*?[")


def invalid_reason(pattern: str) -> str | None:
    """Why a pattern cannot be used at all, if so."""
    if not pattern.startswith("re:"):
        return None
    try:
        re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        return f"'{pattern}' is not a regular expression: {error}"
    return None


def layer_of(name: str) -> int | None:
    """The first number among the name's components: `model.layers.3.mlp.up_proj` is in layer 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def ending(name: str) -> str:
    """The last component: `q_proj`."""
    return name.rsplit(".", 1)[-1]


def nearest(pattern: str, names: Iterable[str]) -> str | None:
    endings = sorted({ending(name) for name in names})
    close = difflib.get_close_matches(pattern, endings, n=1)
    return close[0] if close else None


def shortest_list(chosen: set[str], all_names: Iterable[str]) -> list[str]:
    """The plainest list of name endings that chooses exactly ``chosen``; whole names where none does."""
    endings = {ending(name) for name in chosen}
    selected = {name for name in all_names if ending(name) in endings}
    return sorted(endings) if selected == chosen else sorted(chosen)
