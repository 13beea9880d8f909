"""`lora combine`: several adapters of one base made into one, without the base."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_cli.adapters.adapter import Adapter, LowRank
from lora_cli.adapters.combining import METHODS, PER_FACTOR, SPARSE, Settings, combine_updates
from lora_cli.adapters.configuration import rewritten
from lora_cli.adapters.spectrum import distance, frobenius_norm, singular_values, weighted_sum
from lora_cli.commands.adapter_folder import check_new, read_low_rank, write_adapter
from lora_cli.commands.provenance import read_provenance
from lora_cli.errors import UsageError
from lora_cli.storage import new_folder


@dataclass(frozen=True)
class CombineReport:
    """What `lora combine` did."""

    adapters: list[str]
    weights: list[float]
    method: str
    density: float | None
    seed: int | None
    output: str
    modules: int
    ranks: list[int]  # those that occur
    parameters: int
    # norm of (the result less the weighted sum of the updates) over the norm of that sum; None where the sum is zero
    distance_from_sum: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def combine(folders: Sequence[Path], weights: Sequence[float], output: Path, settings: Settings) -> CombineReport:
    """Write one adapter that stands for all, weighted.

    Raises ``UsageError`` for adapters that do not go together by this method, and for a folder that exists.
    """
    _check_settings(folders, weights, settings)
    check_new(output)
    adapters = [read_low_rank(folder, "its magnitudes cannot be added", "merge it instead") for folder in folders]
    _check_alike(folders, adapters)
    _check_modules(folders, adapters, settings.method)
    made = _combined(adapters, weights, settings)
    config = _config(adapters, made)
    with new_folder(output) as temporary:
        write_adapter(temporary, made, {}, config, folders[0])
    return _report(folders, weights, output, settings, adapters, made)


def _check_settings(folders: Sequence[Path], weights: Sequence[float], settings: Settings) -> None:
    if settings.method not in METHODS:
        raise UsageError(f"--method {settings.method} is not known", f"use one of {', '.join(METHODS)}")
    if len(folders) < 2:
        raise UsageError("one adapter alone cannot be combined", "name two or more")
    if len(weights) != len(folders):
        raise UsageError(
            f"{len(folders)} adapters need {len(folders)} weights, not {len(weights)}",
            f"give one for each: --weights {','.join(['0.5'] * len(folders))}",
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError("--weights must be finite numbers")
    if settings.method in SPARSE and not 0 < settings.density <= 1:
        raise UsageError(f"--density {settings.density} is no share", "give more than 0 and at most 1, such as 0.5")
    if settings.rank is not None and (settings.method != "svd" or settings.rank < 1):
        raise UsageError(f"--rank {settings.rank} with --method {settings.method}", "a rank of 1 or more is for svd")


def _check_alike(folders: Sequence[Path], adapters: Sequence[Adapter]) -> None:
    """The same base and task, and nothing but low-rank updates."""
    for folder, adapter in zip(folders, adapters, strict=True):
        if adapter.saved:
            names = sorted({name.rpartition(".")[0] for name in adapter.saved})
            raise UsageError(
                f"{folder} holds modules trained in full ({', '.join(names)}): they cannot be combined",
                "train the adapters without modules_to_save",
            )
        if not _same_base(folders[0], adapters[0], folder, adapter):
            raise UsageError(
                f"{folders[0]} and {folder} belong to different bases: {adapters[0].base} and {adapter.base}",
                "combine adapters that were trained on the same base",
            )
        if adapter.task != adapters[0].task:
            raise UsageError(f"{folders[0]} is for {adapters[0].task} and {folder} for {adapter.task}")


def _same_base(first_folder: Path, first: Adapter, folder: Path, adapter: Adapter) -> bool:
    """By the fingerprints of the weights where both are known, by name and revision otherwise."""
    prints = [read_provenance(path).base_fingerprint for path in (first_folder, folder)]
    if None not in prints:
        return prints[0] == prints[1]
    return (first.base, first.config.get("revision")) == (adapter.base, adapter.config.get("revision"))


def _check_modules(folders: Sequence[Path], adapters: Sequence[Adapter], method: str) -> None:
    """Equal shapes wherever a module is in several; equal modules and ranks for the methods on factors."""
    first = adapters[0].updates
    seen: dict[str, tuple[int, int]] = {}
    for folder, adapter in zip(folders, adapters, strict=True):
        odd = sorted(first.keys() ^ adapter.updates.keys())
        if odd and method in PER_FACTOR:
            raise UsageError(
                f"{folders[0]} and {folder} adapt different modules ({', '.join(odd[:3])}{' ...' if odd[3:] else ''}), "
                f"and {method} needs the same",
                "use --method cat or svd",
            )
        for name, update in adapter.updates.items():
            shape = (update.lora_B.shape[0], update.lora_A.shape[1])
            if seen.setdefault(name, shape) != shape:
                raise UsageError(f"{name} is {seen[name]} in one adapter and {shape} in {folder}")
            if method in PER_FACTOR and len(update.lora_A) != len(first[name].lora_A):
                raise UsageError(
                    f"{name} has rank {len(first[name].lora_A)} in {folders[0]} and {len(update.lora_A)} in {folder}, "
                    f"and {method} needs equal ranks",
                    "use --method cat or svd",
                )


def _combined(adapters: Sequence[Adapter], weights: Sequence[float], settings: Settings) -> dict[str, LowRank]:
    """By module; one that some adapters lack is made of the others."""
    return {name: combine_updates(name, *_parts(adapters, weights, name), settings) for name in _names(adapters)}


def _names(adapters: Sequence[Adapter]) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.updates))


def _parts(adapters: Sequence[Adapter], weights: Sequence[float], name: str) -> tuple[list[LowRank], list[float]]:
    pairs = [(a.updates[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.updates]
    return [update for update, _ in pairs], [weight for _, weight in pairs]


def _config(adapters: Sequence[Adapter], made: dict[str, LowRank]) -> dict[str, Any]:
    """The first one's, with whole module names as targets where the others' targets are not its own."""
    ranks = {name: len(update.lora_A) for name, update in made.items()}
    like = adapters[0].config
    if any(adapter.updates.keys() != made.keys() for adapter in adapters):
        like = like | {"target_modules": None}
    fan_in_fan_out = any(adapter.config.get("fan_in_fan_out") for adapter in adapters)
    config = rewritten(like, ranks, dict.fromkeys(made, 1.0))
    return config | ({"fan_in_fan_out": True} if fan_in_fan_out else {})


def _report(
    folders: Sequence[Path],
    weights: Sequence[float],
    output: Path,
    settings: Settings,
    adapters: Sequence[Adapter],
    made: dict[str, LowRank],
) -> CombineReport:
    random = settings.method.startswith("dare")
    return CombineReport(
        adapters=[os.fspath(folder) for folder in folders],
        weights=list(weights),
        method=settings.method,
        density=settings.density if settings.method in SPARSE else None,
        seed=settings.seed if random else None,
        output=os.fspath(output),
        modules=len(made),
        ranks=sorted({len(update.lora_A) for update in made.values()}),
        parameters=sum(tensor.numel() for update in made.values() for tensor in update.tensors.values()),
        distance_from_sum=_distance_from_sum(adapters, weights, made),
    )


def _distance_from_sum(adapters: Sequence[Adapter], weights: Sequence[float], made: dict[str, LowRank]) -> float | None:
    """Module by module, since the sums are float64 and their ranks add up."""
    norm = off = 0.0
    for name, update in made.items():
        exact = weighted_sum(*_parts(adapters, weights, name))
        norm = math.hypot(norm, frobenius_norm(singular_values(exact)))
        off = math.hypot(off, distance(update, exact))
    return off / norm if norm else None
