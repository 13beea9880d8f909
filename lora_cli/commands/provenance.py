"""``provenance.json`` beside an adapter: which base it was trained on, and what its head's classes are called.

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

    def write(self, folder: Path) -> None:
        write_json(folder / NAME, asdict(self))


def read_provenance(folder: Path) -> Provenance:
    """Empty for an adapter that another tool wrote."""
    try:
        values = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return Provenance(values["base_fingerprint"], values["labels"])
    except (OSError, ValueError, KeyError, TypeError):
        return Provenance()
