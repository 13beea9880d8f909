"""What a trained tensor is called in PEFT's file, and back.

``base_model.model.<module>.lora_A.weight``; DoRA's magnitudes and parameters trained in full without ``.weight``.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_cli.adapters.experts import STACKED
from lora_cli.adapters.patterns import matches
from lora_cli.adapters.tokens import ROWS

PREFIX = "base_model.model."


def file_name_of(name: str, stacked: Sequence[str] = ()) -> str:
    """A trained tensor's name in the file: lora_A and lora_B are modules of their own in PEFT, as are single rows.

    PEFT wraps the module around ``stacked`` parameters once for each, the model's first one innermost, and names a
    wrapper by its depth.
    """
    if name.endswith(f".{ROWS}"):
        return f"{PREFIX}{name.removesuffix(ROWS)}token_adapter.{ROWS}"
    if not name.endswith((".lora_A", ".lora_B")):
        return PREFIX + name
    module, _, part = name.rpartition(".")
    owner, _, parameter = module.rpartition(".")
    inside = _stacked_in(owner, stacked)
    if parameter in inside:
        module = owner + ".base_layer" * (len(inside) - 1 - inside.index(parameter))
    return f"{PREFIX}{module}.{part}.weight"


def trained_name_of(name: str, stacked: Sequence[str] = ()) -> str:
    """The inverse of ``file_name_of``."""
    name = name.removeprefix(PREFIX).replace(f".token_adapter.{ROWS}", f".{ROWS}")
    if not name.endswith((".lora_A.weight", ".lora_B.weight")):
        return name
    module, _, part = name.removesuffix(".weight").rpartition(".")
    owner = module
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    if inside := _stacked_in(owner, stacked):
        depth = module.count(".base_layer") - owner.count(".base_layer")
        module = f"{owner}.{inside[max(0, len(inside) - 1 - depth)]}"
    return f"{module}.{part}"


def _stacked_in(owner: str, stacked: Sequence[str]) -> list[str]:
    """Which parameters of a module `target_parameters` names, in the model's order."""
    return [name for name in STACKED if any(matches(f"{owner}.{name}", pattern) for pattern in stacked)]
