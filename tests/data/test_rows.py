"""Rows from every kind of file, each with its place; nothing is lost without a word."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.rows import BadRow, Row, Rows, parse_split, raise_bad_rows, read_rows, slice_rows
from lora_cli.errors import DataError, RecipeError
from lora_cli.recipe import DatasetSection

ROWS = [{"prompt": 'a "quoted" one', "completion": "two\nlines"}, {"prompt": "日本, 😀", "completion": "tab\there"}]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str | bytes) -> str:
    raw = text.encode() if isinstance(text, str) else text
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return name


def read(*paths: str, **section: Any) -> Rows:
    settings = DatasetSection.model_validate({"path": list(paths)} | section)
    return read_rows(settings, settings.path, settings.split)


def pairs(rows: Rows) -> list[tuple[str, dict[str, Any]]]:
    return [(row.where, row.columns) for row in rows.rows]


def bad(rows: Rows) -> list[str]:
    return [str(row) for row in rows.bad]


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


TEXTS: dict[str, tuple[str, list[str], list[dict[str, Any]]]] = {
    "jsonl": ("\n".join(map(json.dumps, ROWS)) + "\n", ["1", "2"], ROWS),
    "json": (json.dumps(ROWS, indent=1), ["2", "6"], ROWS),
    "csv": (
        "prompt,completion\n" + "".join(f"{quoted(r['prompt'])},{quoted(r['completion'])}\n" for r in ROWS),
        ["2", "4"],  # the first row's field holds a line break
        ROWS,
    ),
    "tsv": (
        "prompt\tcompletion\n\"open\tone\nclosed\"\t'two'\n",
        ["2", "3"],
        [{"prompt": '"open', "completion": "one"}, {"prompt": 'closed"', "completion": "'two'"}],
    ),
}


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", TEXTS)
def test_every_kind_of_text_file(kind: str, gz: str):
    """The same rows from each, and each row with the line where it begins."""
    text, lines, rows = TEXTS[kind]
    name = write(f"rows.{kind}{gz}", text)
    assert pairs(read(name)) == [(f"{name}:{line}", row) for line, row in zip(lines, rows, strict=True)]
    assert read(name).sources == [name]


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_a_text_file_is_one_row(gz: str):
    name = write(f"book.txt{gz}", "One.\n\nTwo.\n")
    assert pairs(read(name)) == [(name, {"text": "One.\n\nTwo.\n"})]


def test_parquet(capfd):
    import pyarrow
    import pyarrow.parquet

    messages = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]] * 2
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages, "n": [1, None]}), "rows.parquet")
    assert pairs(read("rows.parquet")) == [
        ("rows.parquet row 1", {"messages": messages[0], "n": 1}),
        ("rows.parquet row 2", {"messages": messages[0], "n": None}),
    ]
    write("broken.parquet", b"PAR1 no")
    with pytest.raises(DataError, match=r"^broken.parquet cannot be read as Parquet: "):
        read("broken.parquet")
    assert capfd.readouterr() == ("", "")


def test_folder_glob_and_list_keep_the_order():
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.json"):
        write(f"data/{name}", f'[{{"n": "{name}"}}]' if name.endswith("json") else f'{{"n": "{name}"}}\n')
    names = ["a.jsonl.gz", "b.jsonl", "sub/c.json"]
    assert [row["n"] for _, row in pairs(read("data"))] == names
    assert [row["n"] for _, row in pairs(read("data/*.jsonl*"))] == names[:2]
    assert [row["n"] for _, row in pairs(read("data/sub", "data/b.jsonl"))] == ["sub/c.json", "b.jsonl"]
    assert read("data").sources == [f"data/{name}" for name in names]


def test_json_lines_under_json_and_blank_lines():
    write("a.json", '{"n": 1}\n\n  \n{"n": 2}\n')
    assert pairs(read("a.json")) == [("a.json:1", {"n": 1}), ("a.json:4", {"n": 2})]


def test_a_byte_order_mark():
    for name, text in [("a.jsonl", '{"n": "1"}'), ("a.json", '[{"n": "1"}]'), ("a.csv", "n\n1\n"), ("a.tsv", "n\n1\n")]:
        write(name, b"\xef\xbb\xbf" + text.encode())
        assert [row for _, row in pairs(read(name))] == [{"n": "1"}]


def test_lines_end_with_newlines_only():
    """Not with the separators that str.splitlines knows: those stand inside of texts."""
    text = "one\u2028two\x85three\x0cfour"
    write("a.jsonl", json.dumps({"n": text}, ensure_ascii=False) + "\r\n" + '{"n": 2}\r\n')
    assert pairs(read("a.jsonl")) == [("a.jsonl:1", {"n": text}), ("a.jsonl:2", {"n": 2})]
    write("a.tsv", f"n\tm\r\n{text}\t2\r\n")
    assert pairs(read("a.tsv")) == [("a.tsv:2", {"n": text, "m": "2"})]


def test_bad_rows_are_named_by_line_and_the_others_are_read():
    lines = [b'{"n": 1}', b'{"n": ', b"[1]", b'"x"', b"null", b"\xff", b'{"n": "\\ud83d"}']
    lines += [b"[" * 99_999, b'{"n": ' + b"9" * 5000 + b"}", b'{"n": 9}']
    write("a.jsonl", b"\n".join(lines))
    rows = read("a.jsonl")
    assert pairs(rows) == [("a.jsonl:1", {"n": 1}), ("a.jsonl:10", {"n": 9})]
    assert [line.split(": ")[0] for line in bad(rows)] == [f"a.jsonl:{line}" for line in range(2, 10)]
    assert bad(rows)[0] == "a.jsonl:2: is not JSON: Expecting value: line 2 column 1 (char 7)"
    assert bad(rows)[1] == "a.jsonl:3: must be a JSON object with columns, not a list"
    assert bad(rows)[4] == "a.jsonl:6: is not UTF-8 text"
    assert bad(rows)[5] == "a.jsonl:7: holds half a character (an escape such as \\ud83d without its other half)"


def test_json_of_any_depth_is_a_row_or_a_bad_row():
    """Reading and checking reach Python's limit at slightly different depths."""
    for opening, closing in [("[", "]"), ('{"a": ', "}")]:
        write("a.jsonl", "".join(f'{{"n": {opening * n}1{closing * n}}}\n' for n in range(700, 1000, 3)))
        rows = read("a.jsonl")
        assert len(rows.rows) + len(rows.bad) == 100


def test_rows_of_another_width():
    write("a.csv", "a,b\n1,2\n3\n\n4,5,6\n7,8\n")
    rows = read("a.csv")
    assert pairs(rows) == [("a.csv:2", {"a": "1", "b": "2"}), ("a.csv:6", {"a": "7", "b": "8"})]
    assert bad(rows) == [
        "a.csv:3: has 1 fields where the header has 2",
        "a.csv:5: has 3 fields where the header has 2",
    ]


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "empty jsonl": ("a.jsonl", b"", "a.jsonl holds no rows"),
    "blank jsonl": ("a.jsonl", b"\n \n", "a.jsonl holds no rows"),
    "empty json": ("a.json", b"", "a.json holds no rows"),
    "empty array": ("a.json", b"[ ]", "a.json holds no rows"),
    "empty txt": ("a.txt", b" \n", "a.txt holds no rows"),
    "empty csv": ("a.csv", b"", "a.csv holds no rows"),
    "header only": ("a.csv", b"a,b\n", "a.csv holds no rows"),
    "an open array": ("a.json", b'[{"n": 1},\n{"n": 2}\n', "a.json:3: the JSON array is not closed"),
    "no JSON": ("a.json", b'[{"n": 1},\n{"n": }]\n', "a.json:2: is not JSON: "),
    "more behind": ("a.json", b'[{"n": 1}]\n[{"n": 2}]\n', "a.json:1: there is more behind the JSON array"),
    "UTF-16 json": ("a.json", '[{"n": 1}]'.encode("utf-16"), "a.json:1: is not UTF-8 text"),
    "latin-1 txt": ("a.txt", b"one\ntw\xf6\n", "a.txt:2: is not UTF-8 text"),
    "latin-1 csv": ("a.csv", b"a,b\n1,2\ntw\xf6,3\n", "a.csv:3: is not UTF-8 text"),
    "latin-1 tsv": ("a.tsv", b"a\tb\n1\ttw\xf6\n", "a.tsv:2: is not UTF-8 text"),
    "columns twice": ("a.csv", b"\na,a\n1,2\n", "a.csv:2: the header needs a different name for every column, not"),
    "a column without name": ("a.tsv", b"a\t\n1\t2\n", "a.tsv:1: the header needs a different name for every column"),
    "an open quote": ("a.csv", b'a,b\n1,2\n3,"four\nfive\n', "a.csv:3: unexpected end of data"),
    "a quote in a field": ("a.csv", b'a,b\n"1"x,2\n', "a.csv:2: ',' expected after '\"'"),
    "no gzip": ("a.jsonl.gz", b"hello", "cannot read a.jsonl.gz: Not a gzipped file (b'he')"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"n": 1}\n' * 99)[:-9], "cannot read a.jsonl.gz: Compressed file ended"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_refused(kind: str):
    name, raw, message = REFUSED[kind]
    Path(name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        read(name)
    assert str(caught.value).startswith(message)


def test_a_damaged_gzip_file():
    raw = bytearray(gzip.compress(b"".join(b'{"n": %d}\n' % n for n in range(500))))
    raw[20:30] = b"\xff" * 10
    Path("a.jsonl.gz").write_bytes(bytes(raw))
    with pytest.raises(DataError, match=r"^cannot read a.jsonl.gz: Error -3 while decompressing data"):
        read("a.jsonl.gz")


def test_a_folder_under_a_files_name():
    Path("a.jsonl").mkdir()
    with pytest.raises(DataError, match=r"the folder a\.jsonl holds no data file"):
        read("a.jsonl")


# --- splits and slices


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", range(20)),
        ("train[:10]", range(10)),
        ("train[15:]", range(15, 20)),
        ("train[-5:]", range(15, 20)),
        ("train[:-5]", range(15)),
        ("train[10%:50%]", range(2, 10)),
        ("train[:33%]", range(7)),  # 6.6 is nearer to 7
        ("train[-10%:]", range(18, 20)),
        ("train[:-10%]", range(18)),
        ("train[5:50%]", range(5, 10)),
        ("train[:]", range(20)),
        ("train[:99]", range(20)),
        ("train[:200%]", range(20)),
    ],
)
def test_slices(split: str, numbers: range):
    write("a.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(20)))
    assert [row["n"] for _, row in pairs(read("a.jsonl", split=split))] == list(numbers)


@given(count=st.integers(0, 40), percent=st.integers(0, 100))
@settings(derandomize=True, database=None, max_examples=60)
def test_two_percentages_part_the_rows(count: int, percent: int):
    """train[:p%] and train[p%:] hold every row once; so do train[:-p%] and train[-p%:]."""
    rows = [Row({}, str(n)) for n in range(count)]
    for edge in (f"{percent}%", f"-{percent}%"):
        assert slice_rows(rows, None, edge) + slice_rows(rows, edge, None) == rows


def test_a_last_percent_of_few_rows_is_none_of_them_not_all():
    rows = [Row({}, str(n)) for n in range(10)]
    assert slice_rows(rows, "-1%", None) == []


def test_max_samples_counts_within_the_slice():
    write("a.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(20)))
    assert [row["n"] for _, row in pairs(read("a.jsonl", split="train[5:]", max_samples=3))] == [5, 6, 7]


def test_parse_split():
    assert parse_split("validation.v2[10%:-3]") == ("validation.v2", "10%", "-3")


def test_a_slice_of_nothing_is_an_error():
    write("a.jsonl", '{"n": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl holds no rows"):
        read("a.jsonl", split="train[5:]")


def test_keys_that_local_files_do_not_have():
    write("a.jsonl", '{"n": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl is local, and local files have no split 'test'"):
        read("a.jsonl", split="test")
    with pytest.raises(RecipeError) as caught:
        read("a.jsonl", name="main")
    assert [(m.name, m.message) for m in caught.value.mistakes] == [
        ("dataset.name", "belongs to hub data sets, and a.jsonl is local")
    ]


# --- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """``hub(result)`` stands in for datasets.load_dataset and returns the calls it gets."""
    import datasets

    def put(result: Any) -> list[Any]:
        calls: list[Any] = []

        def load_dataset(path: str, name: str | None, *, split: str) -> Any:
            calls.append((path, name, split))
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return put


def test_a_hub_data_set(hub: Callable[..., list[Any]]):
    calls = hub([{"n": n} for n in range(10)])
    rows = read("user/set", name="main", split="test[:2]")
    assert calls == [("user/set", "main", "test")]
    assert pairs(rows) == [("user/set[test] row 1", {"n": 0}), ("user/set[test] row 2", {"n": 1})]
    assert rows.sources == ["user/set (test)"]


def test_a_hub_data_set_and_a_file(hub: Callable[..., list[Any]]):
    hub([{"n": 0}])
    assert [where for where, _ in pairs(read("user/set", write("a.jsonl", '{"n": 1}')))] == [
        "user/set[train] row 1",
        "a.jsonl:1",
    ]


@pytest.mark.parametrize(
    ("path", "help"),
    [("trian", "did you mean train?"), ("rows.jsonll", "did you mean rows.jsonl?"), ("user/set", None), ("zzz", None)],
)
def test_neither_a_file_nor_on_the_hub(path: str, help: str | None, hub: Callable[..., list[Any]]):
    """A misspelt file may look like a hub id: then the near name is told besides the hub's answer."""
    Path("train").mkdir()
    write("rows.jsonl", "{}")
    hub(FileNotFoundError("\n  Couldn't reach it\nmore"))
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.message == (
        f"there is no file {path}, and no data set of that name could be loaded from the hub (Couldn't reach it)"
    )
    assert caught.value.help == help


def test_an_empty_hub_data_set(hub: Callable[..., list[Any]]):
    hub([])
    with pytest.raises(DataError, match="user/set holds no rows"):
        read("user/set")


# --- all bad rows at once


def test_bad_rows_are_shown_up_to_twenty():
    rows = [BadRow(f"a:{n}", "is odd") for n in range(23)]
    with pytest.raises(DataError) as caught:
        raise_bad_rows(rows, 50)
    lines = caught.value.message.splitlines()
    assert lines[0] == "23 of 50 rows cannot be used"
    assert lines[1:] == [*(f"    a:{n}: is odd" for n in range(20)), "    ... and 3 more"]
    assert caught.value.help == "mend them, or set dataset.on_bad_row: skip"


# --- real files


def test_sst2_holds_every_row(shared: Path):
    """67,349 and 872 rows, each on a line of its own behind the header."""
    train, dev = read(str(shared / "datasets/sst2/train.tsv")), read(str(shared / "datasets/sst2/dev.tsv"))
    assert (len(train.rows), len(dev.rows)) == (67_349, 872)
    assert train.bad == dev.bad == []
    assert {row.columns["label"] for row in train.rows} == {"0", "1"}
    assert train.rows[-1].where.endswith("train.tsv:67350")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gsm8k_train.jsonl", 7473),
        ("gsm8k_test.jsonl", 1319),
        ("alpaca_gpt4_999.json", 999),
        ("chat_128.messages.jsonl", 128),
        ("identity_500.sharegpt.json", 500),
        ("preference_1100.json", 1100),
        ("wizard_of_oz.txt", 1),
    ],
)
def test_real_files(name: str, count: int, shared: Path):
    rows = read(str(shared / "datasets" / name))
    assert (len(rows.rows), rows.bad) == (count, [])


def test_places_in_a_real_json_array(shared: Path):
    """The line that is told holds the row's opening brace."""
    path = shared / "datasets/alpaca_gpt4_999.json"
    lines = path.read_text().splitlines()
    rows = read(str(path)).rows
    for row in (rows[0], rows[500], rows[-1]):
        line = int(row.where.rpartition(":")[2])
        assert lines[line - 1].strip() == "{"
        assert json.dumps(row.columns["instruction"], ensure_ascii=False) in lines[line]
