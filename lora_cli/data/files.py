"""Which files a `dataset.path` means."""

from __future__ import annotations

import difflib
import glob
import re
from pathlib import Path

from lora_cli.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def kind_of(path: Path) -> str:
    """The ending that decides how a file is read, without ``.gz``; empty where there is none such."""
    endings = path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]
    kind = endings[0].lower() if endings else ""
    return kind if kind in KINDS and not (kind == ".parquet" and path.suffix == ".gz") else ""


def is_local(path: str) -> bool:
    """Whether a path means files here; what looks like neither file nor folder may be a hub id."""
    if glob.has_magic(path) or Path(path).expanduser().exists() or kind_of(Path(path)):
        return True
    return _HUB_ID.fullmatch(path) is None


def expand(path: str) -> list[Path]:
    """The files of a path, folder or glob, in the order of their names."""
    here = Path(path).expanduser()
    if here.is_dir():
        found = sorted(file for file in here.rglob("*") if file.is_file() and kind_of(file))
        if not found:
            raise DataError(f"the folder {path} holds no data file", f"endings read here: {_endings()}")
        return found
    if here.is_file():
        if not kind_of(here):
            raise DataError(f"{path} has an ending that is not known", f"endings read here: {_endings()}")
        return [here]
    if glob.has_magic(path):
        found = sorted(Path(name) for name in glob.glob(str(here), recursive=True) if kind_of(Path(name)))
        if not found:
            raise DataError(f"no data file matches {path}")
        return found
    raise DataError(f"there is no file {path}", _similar(here))


def _endings() -> str:
    return ", ".join(KINDS) + ", each also with .gz (but .parquet)"


def _similar(path: Path) -> str | None:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None
