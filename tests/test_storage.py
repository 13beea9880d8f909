"""Files that are whole or not there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_cli import storage
from lora_cli.errors import FolderInUseError, StorageError
from lora_cli.storage import (
    free_bytes,
    hold_folder,
    is_intact,
    new_folder,
    sha256,
    storage_errors,
    write_json,
    write_text,
)


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@contextmanager
def killed_afterwards(script: str, *arguments: object) -> Iterator[None]:
    """A process runs ``script`` up to where it prints `ready`, and is killed when the block ends."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.send_signal(signal.SIGKILL)


# new_folder


def test_a_new_folder_appears_whole_with_its_manifest(tmp_path):
    with new_folder(tmp_path / "made") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text("abc")
        (folder / "b.bin").write_bytes(b"")
        assert not (tmp_path / "made").exists()
    assert entries(tmp_path) == ["made"]
    assert json.loads((tmp_path / "made" / "manifest.json").read_text()) == {
        "b.bin": {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        "inner/a.txt": {"size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
    }
    assert is_intact(tmp_path / "made")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path, error):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(error), new_folder(tmp_path / "made") as folder:
        fail(folder)
    assert entries(tmp_path) == []


def test_sigkill_in_the_middle_leaves_no_folder_and_the_next_one_cleans_up(tmp_path):
    with killed_afterwards(
        """
        import sys, time
        from pathlib import Path
        from lora_cli.storage import new_folder
        with new_folder(Path(sys.argv[1])) as folder:
            (folder / "half").write_text("x")
            print("ready", flush=True)
            time.sleep(60)
        """,
        tmp_path / "made",
    ):
        pass
    assert entries(tmp_path) == [".made.part"]
    with new_folder(tmp_path / "made") as folder:
        (folder / "whole").write_text("y")
    assert entries(tmp_path) == ["made"]
    assert entries(tmp_path / "made") == ["manifest.json", "whole"]


def test_replacing_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path):
    for text in ("old", "new"):
        with new_folder(tmp_path / "made", replace=True) as folder:
            (folder / "text").write_text(text)
            if text == "new":
                assert (tmp_path / "made" / "text").read_text() == "old"
    assert entries(tmp_path) == ["made"]
    assert (tmp_path / "made" / "text").read_text() == "new"
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "made", replace=True):
        raise ValueError("no")
    assert (tmp_path / "made" / "text").read_text() == "new"


def test_without_replace_a_folder_is_never_overwritten(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "precious").write_text("x")
    with pytest.raises(StorageError), new_folder(tmp_path / "made") as folder:
        (folder / "b").write_text("y")
    assert entries(tmp_path) == ["made"]
    assert entries(tmp_path / "made") == ["precious"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with new_folder(tmp_path / "made") as folder:
            (folder / "secret").write_text("x")
            (folder / "secret").chmod(0o600)  # as safetensors writes
    finally:
        os.umask(before)
    for name in ("secret", "manifest.json"):
        assert stat.S_IMODE((tmp_path / "made" / name).stat().st_mode) == mode
    assert os.umask(before) == before


def test_every_file_is_synced_before_the_rename(tmp_path, monkeypatch):
    done: list[int | str] = []  # inodes: a rename keeps them
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.fstat(fd).st_ino), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b))[1])
    with new_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("x")
        (folder / "b").write_text("y")
    made = tmp_path / "made"
    paths = [made / "a", made / "b", made / "manifest.json", made, None, tmp_path]
    assert done == [path.stat().st_ino if path else "rename" for path in paths]


# is_intact


@pytest.fixture
def made(tmp_path):
    with new_folder(tmp_path / "made") as folder:
        (folder / "a").write_bytes(bytes(range(256)))
        write_json(folder / "b.json", {"x": 1})
    return tmp_path / "made"


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_bit(folder / "a"),
        lambda folder: os.truncate(folder / "a", 255),
        lambda folder: (folder / "a").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"a": {"size": 256}}'),
        lambda folder: (folder / "manifest.json").write_text('{"a": null}'),
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe"),
    ],
    ids=["bit", "cut", "gone", "no-manifest", "torn", "list", "no-hash", "null", "bytes"],
)
def test_any_damage_is_noticed(made, damage):
    assert is_intact(made)
    damage(made)
    assert not is_intact(made)


def test_a_file_that_came_later_does_not_matter(made):
    (made / "notes.txt").write_text("mine")
    assert is_intact(made)


def test_a_folder_that_is_not_there_is_not_intact(tmp_path):
    assert not is_intact(tmp_path / "nowhere")


def test_sha256_of_a_file_larger_than_one_chunk(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(b"a" * ((1 << 20) + 1))
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# write_text


def test_write_text_replaces_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StorageError, match="Input/output error"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_write_json_is_utf8_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "a.json", {"größe": [1, 2.5]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "größe": [\n    1,\n    2.5\n  ]\n}\n'


# errors


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_storage_error_that_says_what_to_do(tmp_path, number):
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == 5
    assert caught.value.message == f"cannot write {tmp_path / 'x'}: {os.strerror(number)}"
    assert "free some space" in caught.value.help


def test_other_refusals_name_the_path_without_that_advice(tmp_path):
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert str(caught.value) == f"cannot write {tmp_path / 'x'}: Permission denied"


def test_safetensors_own_error_is_a_storage_error_and_a_bug_stays_one(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise SafetensorError(f"Error while serializing: I/O error: Full (os error {errno.ENOSPC})")
    assert caught.value.message == f"cannot write {tmp_path}: {os.strerror(errno.ENOSPC)}"
    assert "free some space" in caught.value.help
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise SafetensorError("Error while serializing: something else")
    assert str(caught.value) == f"cannot write {tmp_path}: Error while serializing: something else"
    with pytest.raises(ZeroDivisionError), storage_errors(tmp_path):
        raise ZeroDivisionError


def test_a_disk_that_fills_up_while_sealing_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_sync", full)
    with pytest.raises(StorageError, match="No space left on device"), new_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("x")
    assert entries(tmp_path) == []


def test_a_lora_error_inside_the_block_passes_unchanged(tmp_path):
    with pytest.raises(FolderInUseError, match="busy"), new_folder(tmp_path / "made"):
        raise FolderInUseError("busy")


# hold_folder


def test_a_second_holder_is_refused_with_exit_code_7(tmp_path):
    with hold_folder(tmp_path / "run"):
        with pytest.raises(FolderInUseError) as caught, hold_folder(tmp_path / "run"):
            pass
        assert caught.value.exit_code == 7
        assert caught.value.message == f"another run is writing to {tmp_path / 'run'}"
    with hold_folder(tmp_path / "run"):  # released
        pass


HOLDER = """
import sys, time
from pathlib import Path
from lora_cli.storage import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_another_process_is_refused_and_a_killed_one_frees_the_folder(tmp_path):
    with killed_afterwards(HOLDER, tmp_path / "run"), pytest.raises(FolderInUseError), hold_folder(tmp_path / "run"):
        pass
    with hold_folder(tmp_path / "run"):  # does not wait either: a lock that is held is refused at once
        pass


def test_two_folders_can_be_held_at_once(tmp_path):
    with hold_folder(tmp_path / "a"), hold_folder(tmp_path / "b"):
        assert entries(tmp_path) == ["a", "b"]


def test_a_folder_whose_place_is_taken_by_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(StorageError, match="cannot write"), hold_folder(tmp_path / "run"):
        pass


def test_free_bytes_looks_at_the_nearest_folder_that_exists(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet" / "there") == pytest.approx(free_bytes(tmp_path), rel=0.1)
    assert free_bytes(tmp_path) > 0
