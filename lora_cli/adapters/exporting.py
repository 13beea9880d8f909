"""The form of an adapter that every server reads alike: scale 1, one rank, one type.

Shape suffixes: I in_features, O out_features, R rank, P the rank after padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.adapters.adapter import LowRank
from lora_cli.errors import UsageError


def export_updates(updates: dict[str, LowRank], dtype: torch.dtype) -> dict[str, LowRank]:
    """Every update with its scale folded into B and its rank padded with zeros to the highest one.

    Raises ``UsageError`` where a number is too large for the type.
    """
    rank = max(len(update.lora_A) for update in updates.values())
    made = {name: export_update(update, rank, dtype) for name, update in updates.items()}
    beyond = [name for name, u in made.items() if not all(bool(t.isfinite().all()) for t in u.tensors.values())]
    if beyond:
        raise UsageError(
            f"{str(dtype).removeprefix('torch.')} cannot hold the numbers of {len(beyond)} modules: {beyond[0]}",
            "use --dtype bfloat16",
        )
    return made


def export_update(update: LowRank, rank: int, dtype: torch.dtype) -> LowRank:
    """s B A as (s B) A, computed in float64 and rounded once. Exact in float32 where s is a power of two."""
    missing = rank - len(update.lora_A)
    a_PI = F.pad(update.lora_A.double(), (0, 0, 0, missing))
    b_OP = F.pad(update.scaling * update.lora_B.double(), (0, missing))
    return LowRank(_rounded(a_PI, dtype), _rounded(b_OP, dtype), 1.0)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()
