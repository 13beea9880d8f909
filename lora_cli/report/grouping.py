"""Equal modules of many layers as one row: ``model.layers.{0..31}.self_attn.q_proj``."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from lora_cli.adapters.targets import Target

T = TypeVar("T")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


@dataclass(frozen=True)
class TargetGroup:
    name: str
    count: int
    target: Target  # one of them; they are alike


def group_targets(targets: list[Target]) -> list[TargetGroup]:
    groups = grouped(targets, lambda t: t.name, lambda t: (t.r, t.scaling, t.in_features, t.out_features))
    return [TargetGroup(name, len(members), members[0]) for name, members in groups]


def grouped(
    items: Iterable[T], name: Callable[[T], str], likeness: Callable[[T], Hashable]
) -> list[tuple[str, list[T]]]:
    """(common name, members), in the order of first appearance."""
    groups: dict[tuple[str, Hashable], list[T]] = {}
    for item in items:
        pattern = _NUMBER.sub("{}", name(item))
        groups.setdefault((pattern, likeness(item)), []).append(item)
    return [(_common(pattern, [name(m) for m in members]), members) for (pattern, _), members in groups.items()]


def _common(pattern: str, names: list[str]) -> str:
    """Fill the places of a pattern with the numbers that occur there."""
    columns = zip(*([int(n) for n in _NUMBER.findall(name)] for name in names), strict=True)
    for numbers in columns:
        pattern = pattern.replace("{}", _numbers(sorted(set(numbers))), 1)
    return pattern


def _numbers(found: list[int]) -> str:
    if len(found) == 1:
        return str(found[0])
    if found == list(range(found[0], found[-1] + 1)):
        return f"{{{found[0]}..{found[-1]}}}"
    return "{" + ",".join(map(str, found)) + "}"
