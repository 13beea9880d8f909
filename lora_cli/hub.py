"""A model's folder on this machine: one that is there already, or the hub's files downloaded."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lora_cli.errors import StorageError, UsageError, first_line
from lora_cli.storage import FULL

HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "tokenizer*"]
WEIGHTS = ["model*.safetensors"]  # some repositories hold the same weights twice, under other names


@dataclass(frozen=True)
class ModelFolder:
    """Where a model's files are, and the commit they came from if they came from the hub."""

    path: Path
    commit: str | None = None


def model_folder(
    name: str,
    revision: str | None = None,
    *,
    weights: bool = True,
    remote_code: bool = False,
    download: bool = True,
) -> ModelFolder:
    """The folder of a hub id or path. Without ``weights`` only the small files are downloaded.

    Without ``download`` nothing is: what was downloaded before is found.

    Raises ``UsageError`` where there is neither a folder nor an answer from the hub.
    """
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser, leaves an unknown ~name as it is
    if os.path.isdir(path):
        return ModelFolder(path)
    if os.path.exists(path):
        raise UsageError(f"{name} is a file; a model is a folder or a hub id")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise UsageError(f"there is no folder {name}", _similar_folder(path))
    patterns = SMALL_FILES + (WEIGHTS if weights else []) + (["*.py"] if remote_code else [])
    return _download(name, revision, patterns, {} if download else {"local_files_only": True})


def _download(name: str, revision: str | None, patterns: list[str], how: dict[str, bool]) -> ModelFolder:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **how))
    except GatedRepoError as error:
        raise UsageError(f"{name} is gated on the hub", "accept its terms there, then run: hf auth login") from error
    except RepositoryNotFoundError as error:
        raise UsageError(f"there is no folder {name}, and the hub knows no such model") from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision} on the hub") from error
    except Exception as error:  # the hub, its HTTP library and its cache each raise their own
        if isinstance(error, OSError) and error.errno in FULL:
            raise StorageError(
                f"cannot download {name}: {error.strerror}", "free some space, or set HF_HOME to a larger disk"
            ) from error
        raise UsageError(
            f"there is no folder {name}, and the hub could not be reached for it ({first_line(error)})",
            _similar_folder(Path(name)) or "check the spelling, or download the model and give its folder",
        ) from error
    return ModelFolder(path, commit=path.name)


def _similar_folder(path: Path) -> str | None:
    if not path.parent.is_dir():
        return None
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in their index's order; a single file goes first, as in transformers.

    Raises ``UsageError`` for a folder with pickled weights only, or with none.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in dict.fromkeys(weight_map(index).values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UsageError(f"{folder} lacks weight files named in its index: {', '.join(missing)}")
        return files
    pickled = [entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled:
        raise UsageError(
            f"{folder} holds pickled weights only ({', '.join(sorted(pickled)[:3])})",
            "a pickle can run code when it is read: convert the model to safetensors first",
        )
    raise UsageError(f"{folder} holds no model.safetensors", "is this a model's folder?")


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from a ``model.safetensors.index.json``."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not table or not all(os.path.basename(name) == name for name in table.values()):
            raise ValueError("no weight files beside the index")
        return dict(table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is not an index of weight files") from error
