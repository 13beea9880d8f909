"""``provenance.json`` beside an adapter: which base it was trained on and how that was stored, and what its head's
classes are called.

PEFT warns of unknown keys in its own configuration, so what it has no key for stands here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_cli.storage import write_json

NAME = "provenance.json"


@dataclass(frozen=True)
class Provenance:
    base_fingerprint: str | None = None
    labels: list[str] = field(default_factory=list)
    quantization: str | None = None  # of the base, while it was trained on
    quantized_from: str | None = None  # the dtype that the base had then

    def write(self, folder: Path) -> None:
        write_json(folder / NAME, asdict(self))


def read_provenance(folder: Path) -> Provenance:
    """Empty for an adapter that another tool wrote."""
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
        packed = (values.get("quantization"), values.get("quantized_from"))
        return Provenance(values["base_fingerprint"], values["labels"], *packed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Provenance()
