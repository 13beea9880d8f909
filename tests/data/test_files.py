"""Which files a path means."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.data.files import KINDS, expand, is_local, kind_of
from lora_cli.errors import DataError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((f"a{kind}", kind) for kind in KINDS),
        *((f"a{kind}.gz", kind) for kind in KINDS if kind != ".parquet"),
        ("a.parquet.gz", ""),
        ("A.JSONL", ".jsonl"),
        ("a.b.c.jsonl.gz", ".jsonl"),
        ("a.gz", ""),
        ("a.yaml", ""),
        ("jsonl", ""),
        ("a.jsonl.bak", ""),
    ],
)
def test_kind_of(name: str, kind: str):
    assert kind_of(Path(name)) == kind


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("rows.jsonl", True),  # an ending that is read here, though no such file exists
        ("data/*.jsonl", True),
        ("here", True),  # exists
        ("./elsewhere", True),
        ("/elsewhere", True),
        ("a/b/c", True),
        ("~nobody-of-this-name/rows", True),
        ("elsewhere", False),
        ("HuggingFaceH4/ultrachat_200k", False),
        ("x" * 400, False),  # too long for a file name
    ],
)
def test_is_local(path: str, local: bool):
    Path("here").mkdir()
    assert is_local(path) is local


def test_a_file_a_folder_and_a_glob():
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.txt", "sub/deep/d.csv", "README.md", "x.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    assert expand("b.jsonl") == [Path("b.jsonl")]
    assert expand(".") == [Path("a.jsonl.gz"), Path("b.jsonl"), Path("sub/c.txt"), Path("sub/deep/d.csv")]
    assert expand("sub") == [Path("sub/c.txt"), Path("sub/deep/d.csv")]
    assert expand("*") == [Path("a.jsonl.gz"), Path("b.jsonl")]
    assert expand("**/*.csv") == [Path("sub/deep/d.csv")]


def test_a_file_whose_name_looks_like_a_glob():
    Path("rows[1].jsonl").touch()
    assert expand("rows[1].jsonl") == [Path("rows[1].jsonl")]


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("rows.jsonl").touch()
    assert expand("~/rows.jsonl") == [tmp_path / "rows.jsonl"]


@pytest.mark.parametrize(
    ("path", "message", "help"),
    [
        ("trian.jsonl", "there is no file trian.jsonl", "did you mean train.jsonl?"),
        ("none/a.jsonl", "there is no file none/a.jsonl", "there is no folder none either"),
        ("zzz.csv", "there is no file zzz.csv", None),
        ("x" * 400 + ".csv", "there is no file xxx", None),
        ("~nobody-of-this-name/a.csv", "there is no file ~nobody", "there is no folder ~nobody-of-this-name either"),
        ("notes.md", "notes.md has an ending that is not known", "endings read here: .jsonl, .json, .csv, .tsv, .txt"),
        ("empty", "the folder empty holds no data file", "endings read here: .jsonl"),
        ("*.tsv", "no data file matches *.tsv", None),
    ],
)
def test_refusals(path: str, message: str, help: str | None):
    Path("train.jsonl").touch()
    Path("notes.md").touch()
    Path("empty").mkdir()
    with pytest.raises(DataError) as caught:
        expand(path)
    assert caught.value.message.startswith(message)
    assert caught.value.help == help if help is None else caught.value.help.startswith(help)
