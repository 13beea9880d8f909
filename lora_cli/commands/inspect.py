"""`lora inspect`: what an adapter holds, and how it differs from another one, from their files alone."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_cli.adapters.adapter import Adapter, LowRank, single_updates
from lora_cli.adapters.files import WEIGHTS, read_adapter
from lora_cli.adapters.servers import Verdict, verdicts
from lora_cli.adapters.spectrum import (
    cosine,
    distance,
    effective_rank,
    frobenius_norm,
    is_dead,
    is_finite,
    singular_values,
)
from lora_cli.commands.adapter_folder import files_of
from lora_cli.commands.provenance import read_provenance
from lora_cli.errors import UsageError
from lora_cli.tensorfile import tensor_table

ALIVE, DEAD, NON_FINITE = "alive", "dead", "not finite"


@dataclass(frozen=True)
class ModuleFacts:
    """One module's update s B A. ``norm`` is Frobenius'; of numbers that are not finite nothing is computed."""

    name: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    state: str  # alive, dead (A or B is zero) or not finite
    norm: float | None
    effective_rank: float | None
    parameters: int


@dataclass(frozen=True)
class ModuleDifference:
    """The same module of two adapters; None where the angle or the ratio has no meaning."""

    name: str
    cosine: float | None
    norm_change: float | None  # the other's norm over this one's, less 1
    distance: float | None  # norm of the difference over this one's norm


@dataclass(frozen=True)
class Difference:
    """Two adapters, module by module."""

    other: str
    modules: list[ModuleDifference]
    only_here: list[str]
    only_there: list[str]
    unlike: list[str]  # modules of different shapes


@dataclass(frozen=True)
class Inspection:
    """What `lora inspect` found."""

    adapter: str
    base: str | None
    revision: str | None
    base_fingerprint: str | None
    task: str
    use_dora: bool
    use_rslora: bool
    parameters: int
    dtypes: list[str]
    norm: float | None  # of all updates together
    modules: list[ModuleFacts]
    saved: dict[str, list[int]]  # parameters held in full, and their shapes
    servers: list[Verdict]
    difference: Difference | None

    def in_state(self, state: str) -> list[str]:
        return [module.name for module in self.modules if module.state == state]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(folder: Path, other: Path | None = None) -> Inspection:
    """Look at an adapter, or compare two. Nothing but their files is read.

    Raises ``UsageError`` for a folder that is no adapter of a kind known here, and ``StorageError`` for a damaged one.
    """
    adapter = read_adapter(folder)
    modules = [module_facts(name, update) for name, update in single_updates(adapter.updates).items()]
    table = tensor_table(folder / WEIGHTS)
    norms = [module.norm for module in modules]
    return Inspection(
        adapter=os.fspath(folder),
        base=adapter.base,
        revision=adapter.config.get("revision"),
        base_fingerprint=read_provenance(folder).base_fingerprint,
        task=adapter.task,
        use_dora=bool(adapter.config.get("use_dora")),
        use_rslora=bool(adapter.config.get("use_rslora")),
        parameters=sum(math.prod(entry.shape) for entry in table),
        dtypes=sorted({entry.dtype for entry in table}),
        norm=None if None in norms else math.hypot(*(norm for norm in norms if norm is not None)),
        modules=modules,
        saved={name: list(tensor.shape) for name, tensor in adapter.saved.items()},
        servers=verdicts(files_of(folder, adapter)),
        difference=_difference(folder, adapter, other) if other is not None else None,
    )


def module_facts(name: str, update: LowRank) -> ModuleFacts:
    """Sizes, scale and state of one update; norm and effective rank only of finite numbers."""
    a_RI, b_OR = update.lora_A, update.lora_B
    finite = is_finite(update)
    values_K = singular_values(update) if finite else None
    return ModuleFacts(
        name=name,
        in_features=a_RI.shape[1],
        out_features=b_OR.shape[0],
        rank=a_RI.shape[0],
        scaling=update.scaling,
        state=NON_FINITE if not finite else DEAD if is_dead(update) else ALIVE,
        norm=frobenius_norm(values_K) if values_K is not None else None,
        effective_rank=effective_rank(values_K) if values_K is not None else None,
        parameters=sum(tensor.numel() for tensor in update.tensors.values()),
    )


def _difference(folder: Path, adapter: Adapter, path: Path) -> Difference:
    other = read_adapter(path)
    here, there = single_updates(adapter.updates), single_updates(other.updates)
    both = [name for name in here if name in there]
    unlike = [name for name in both if _features(here[name]) != _features(there[name])]
    if not both:
        raise UsageError(f"{folder} and {path} have no module in common", "compare adapters of the same kind of base")
    return Difference(
        other=os.fspath(path),
        modules=[module_difference(name, here[name], there[name]) for name in both if name not in unlike],
        only_here=[name for name in here if name not in there],
        only_there=[name for name in there if name not in here],
        unlike=unlike,
    )


def _features(update: LowRank) -> tuple[int, int]:
    return update.lora_A.shape[1], update.lora_B.shape[0]


def module_difference(name: str, one: LowRank, other: LowRank) -> ModuleDifference:
    if not is_finite(one) or not is_finite(other):
        return ModuleDifference(name, None, None, None)
    norm, changed = frobenius_norm(singular_values(one)), frobenius_norm(singular_values(other))
    if norm == 0:
        return ModuleDifference(name, None, None, None)
    return ModuleDifference(name, cosine(one, other), changed / norm - 1, distance(one, other) / norm)
