"""Files that are whole or not there: folders written aside, hashed, synced and renamed.

safetensors finds truncation but not a flipped bit, saves with mode 0600 and does not sync; so hashes, modes
and fsync are done here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_cli.errors import FolderInUseError, StorageError

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT)  # how the system says that there is no space left
_CHUNK = 1 << 20
_NUMBER = re.compile(r"\(os error ([0-9]+)\)")  # how Rust tells of an errno


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Name the path and the cure when the operating system refuses to write."""
    try:
        yield
    except OSError as error:
        raise _not_written(path, error.errno, error.strerror or str(error)) from error
    except Exception as error:  # safetensors wraps OSError in an exception of its own
        if type(error).__name__ != "SafetensorError":
            raise
        number = _NUMBER.search(str(error))
        told = (int(number[1]), os.strerror(int(number[1]))) if number else (None, str(error))
        raise _not_written(path, *told) from error


def _not_written(path: Path, number: int | None, reason: str) -> StorageError:
    help = "free some space and type the same command again" if number in FULL else None
    return StorageError(f"cannot write {path}: {reason}", help)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new, never half of one."""
    temporary = path.with_name(f".{path.name}.part")
    with storage_errors(path):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` when the block ends well and vanishes when it does not.

    Every file is given the usual mode and synced, the manifest (sizes and SHA-256) is written last, and the
    rename comes after that. With ``replace``, an older folder at ``path`` is moved away first.
    """
    temporary = path.with_name(f".{path.name}.part")
    with storage_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _seal(temporary)
            _swap_in(temporary, path, replace)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _seal(folder: Path) -> None:
    """Modes, manifest and fsync: after this the folder may be renamed."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries = {}
    for file in files:
        file.chmod(0o666 & ~_umask())
        entries[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": sha256(file)}
        _sync(file)
    write_json(folder / MANIFEST, entries)
    for parent in {file.parent for file in files} | {folder}:
        _sync(parent)


def _swap_in(temporary: Path, path: Path, replace: bool) -> None:
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if replace and path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_intact(folder: Path) -> bool:
    """Whether every file of the manifest is there with its size and hash."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == entry["size"] and sha256(folder / name) == entry["sha256"]
            for name, entry in entries.items()
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def hold_folder(path: Path) -> Iterator[None]:
    """Make the folder and hold it for one process; the system frees the lock of a killed one.

    A folder that was made here and got no file vanishes again.
    """
    made = not path.exists()
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:  # an OSError too, so it must not reach storage_errors
            raise FolderInUseError(
                f"another run is writing to {path}", "wait for it, stop it, or choose another output_dir"
            ) from None
    try:
        yield
    finally:
        lock.release()
        if made and [entry.name for entry in path.iterdir()] == [".lock"]:
            shutil.rmtree(path, ignore_errors=True)


def free_bytes(path: Path) -> int:
    """Free space of the disk that ``path`` is or will be on."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
