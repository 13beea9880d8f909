"""Which files a `dataset.path` means."""

from __future__ import annotations

import difflib
import glob
import os.path
import re
from pathlib import Path

from lora_cli.errors import DataError
from lora_cli.hub import HUB_ID

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_HELD_OUT = re.compile(r"(^|[._-])(test|dev|valid|validation|eval)([._-]|$)")


def kind_of(path: Path) -> str:
    """The ending that decides how a file is read, without ``.gz``; empty where there is none such."""
    endings = path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]
    kind = endings[0].lower() if endings else ""
    return kind if kind in KINDS and not (kind == ".parquet" and path.suffix == ".gz") else ""


def is_local(path: str) -> bool:
    """Whether a path means files here; what looks like neither file nor folder may be a hub id."""
    if glob.has_magic(path) or os.path.exists(os.path.expanduser(path)) or kind_of(Path(path)):
        return True
    return HUB_ID.fullmatch(path) is None


def expand(path: str) -> list[Path]:
    """The files of a path, folder or glob, in the order of their names."""
    here = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown ~user
    if os.path.isdir(here):  # these two are false for names that are too long, where Path raises
        found = sorted(file for file in here.rglob("*") if file.is_file() and kind_of(file))
        if not found:
            raise DataError(f"the folder {path} holds no data file", f"endings read here: {_endings()}")
        _check_splits(path, found)
        return found
    if os.path.isfile(here):
        if not kind_of(here):
            raise DataError(f"{path} has an ending that is not known", f"endings read here: {_endings()}")
        return [here]
    if glob.has_magic(path):
        found = sorted(Path(name) for name in glob.glob(str(here), recursive=True) if kind_of(Path(name)))
        if not found:
            raise DataError(f"no data file matches {path}")
        return found
    raise DataError(f"there is no file {path}", similar(here))


def _check_splits(folder: str, files: list[Path]) -> None:
    """Training on the test rows by accident is worse than typing a file's name."""
    held_out = [file.name for file in files if _HELD_OUT.search(file.name.lower())]
    if held_out and len(held_out) < len(files):
        raise DataError(
            f"besides files to train on, the folder {folder} holds what looks held out: {', '.join(held_out[:3])}",
            "name the files in dataset.path, and the held-out ones in dataset.eval_path",
        )


def _endings() -> str:
    return ", ".join(KINDS) + ", each also with .gz (but .parquet)"


def similar(path: Path) -> str | None:
    """What may have been meant by a path where nothing is."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = [entry.name for entry in path.parent.iterdir() if entry.name != path.name]  # a pipe is there, and no file
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None
