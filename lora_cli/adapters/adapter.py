"""An adapter in memory: its updates, single rows of tables and whole parameters, and whether they fit a base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_cli.adapters.configuration import TASK_TYPES
from lora_cli.adapters.embedding import FACTORS as EMBEDDING_FACTORS
from lora_cli.adapters.experts import expert_factors
from lora_cli.adapters.layer import FACTORS, MAGNITUDE
from lora_cli.adapters.targets import Target
from lora_cli.adapters.tokens import ROWS, TokenRows


@dataclass(frozen=True)
class LowRank:
    """One module's update: A (R, I), B (O, R), the scale of B A, and DoRA's magnitudes (O,) where it has them."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    experts: int = 1  # more: A (E R, I) and B (O, R E) of a stacked parameter, see ``experts.py``
    is_embedding: bool = False  # of a table (I, O), which looks its inputs up

    @property
    def r(self) -> int:
        return self.lora_A.shape[0] // self.experts

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = EMBEDDING_FACTORS if self.is_embedding else FACTORS
        found = dict(zip(names, (self.lora_A, self.lora_B), strict=True))
        return found if self.magnitude is None else found | {MAGNITUDE: self.magnitude}


@dataclass
class Adapter:
    """What an adapter folder holds: its configuration, the updates by module, the parameters saved in full, and
    single rows of tables."""

    config: dict[str, Any]
    updates: dict[str, LowRank] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, TokenRows] = field(default_factory=dict)

    @property
    def task(self) -> str:
        by_type = {value: key for key, value in TASK_TYPES.items()}
        return by_type.get(self.config.get("task_type") or "CAUSAL_LM", "causal_lm")

    @property
    def use_dora(self) -> bool:
        return any(update.magnitude is not None for update in self.updates.values())

    @property
    def saved_modules(self) -> list[str]:
        """Modules whose parameters it holds in full."""
        return sorted({name.rsplit(".", 1)[0] for name in self.saved})

    @property
    def base(self) -> str | None:
        return self.config.get("base_model_name_or_path")


def single_updates(updates: dict[str, LowRank]) -> dict[str, LowRank]:
    """Every update as one A and one B: those of a stacked parameter apart, as ``experts.down_proj[3]``."""
    found = {}
    for name, update in updates.items():
        if update.experts == 1:
            found[name] = update
            continue
        for expert in range(update.experts):
            a_RI, b_OR = expert_factors(update.lora_A, update.lora_B, expert, update.experts)
            found[f"{name}[{expert}]"] = LowRank(a_RI, b_OR, update.scaling)
    return found


def targets_of(adapter: Adapter) -> list[Target]:
    return [
        Target(name, u.r, u.scaling, u.lora_A.shape[1], u.lora_B.shape[0], u.experts, u.is_embedding)
        for name, u in adapter.updates.items()
    ]


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """An adapter as ``files.trained_tensors`` gives that of a model."""
    parts = {f"{name}.{kind}": tensor for name, u in adapter.updates.items() for kind, tensor in u.tensors.items()}
    return parts | adapter.saved | {f"{name}.{ROWS}": table.rows for name, table in adapter.tokens.items()}


def mismatches(adapter: Adapter, shapes: dict[str, tuple[int, ...]], transposed: set[str]) -> list[str]:
    """What keeps an adapter from fitting a base whose parameters have these shapes."""
    wrong = []
    for name, update in adapter.updates.items():
        shape = shapes.get(name if update.experts > 1 else f"{name}.weight")
        expected: tuple[int, ...] = (update.lora_B.shape[0], update.lora_A.shape[1])
        if update.experts > 1 and shape is not None:
            if shape not in ((update.experts, *expected), (update.experts, *expected[::-1])):
                wrong.append(f"{name}: the adapter is for {(update.experts, *expected)}, the base has {shape}")
            continue
        if shape is None:
            wrong.append(f"{name}: the base has no such layer")
        elif (shape[::-1] if name in transposed or update.is_embedding else shape) != expected:
            wrong.append(f"{name}: the adapter is for {expected}, the base has {shape}")
    for name, table in adapter.tokens.items():
        if reason := table.mismatch(shapes.get(f"{name}.weight")):
            wrong.append(f"{name}: {reason}")
    for name, tensor in adapter.saved.items():
        if name not in shapes:
            wrong.append(f"{name}: the base has no such parameter")
        elif shapes[name] != tuple(tensor.shape):
            wrong.append(f"{name}: the adapter holds {tuple(tensor.shape)}, the base has {shapes[name]}")
    return wrong
