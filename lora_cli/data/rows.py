"""Rows from files, each with the place it came from.

JSON, JSON lines, CSV, TSV and text are read here, so that an error names ``file:line``; Parquet and hub data
sets go through ``datasets``. TSV follows IANA's text/tab-separated-values: no quoting, ``"`` is a plain
character.
"""

from __future__ import annotations

import csv
import gzip
import json
import os.path
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lora_cli.data.files import expand, is_local, kind_of, similar
from lora_cli.errors import DataError, Mistake, RecipeError, first_line
from lora_cli.recipe import DatasetSection
from lora_cli.recipe.types import SPLIT

SHOWN_BAD_ROWS = 20
_PLACE = re.compile(r"(?P<file>.*)(:| row )(?P<number>[0-9]+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Row:
    """One row's columns, and where it stands: ``file:line``."""

    columns: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class BadRow:
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass
class Rows:
    """The rows of one source, and those that could not be read."""

    rows: list[Row] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


def kind_named(value: Any) -> str:
    """What a value of a row is, in the words of JSON."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")  # Parquet has more


def read_rows(section: DatasetSection, paths: list[str], split: str) -> Rows:
    """All rows of ``paths``, cut to ``split`` and ``max_samples``.

    Raises ``DataError`` for files that are missing, empty or unreadable, and for unknown splits.
    """
    name, start, stop = parse_split(split)
    result = Rows()
    for path in paths:
        if is_local(path):
            if name != "train":
                raise DataError(f"{path} is local, and local files have no split '{name}'", "use dataset.eval_path")
            if section.name is not None:
                raise RecipeError([Mistake(("dataset", "name"), f"belongs to hub data sets, and {path} is local")])
            _read_files(expand(path), result)
        else:
            _read_hub(path, section.name, name, result)
    result.rows = slice_rows(result.rows, start, stop)[: section.max_samples]
    if not result.rows and not result.bad:
        raise DataError(f"{', '.join(paths)} holds no rows")
    return result


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """``train[10%:200]`` is ('train', '10%', '200')."""
    match = SPLIT.fullmatch(split)
    assert match is not None, split  # the recipe took no other
    return match["name"], match["start"], match["stop"]


def slice_rows(rows: list[Row], start: str | None, stop: str | None) -> list[Row]:
    def index(text: str | None) -> int | None:
        if text is None or not text.endswith("%"):
            return None if text is None else int(text)
        percent = int(text[:-1])  # negative ones count from the end; -1 % of ten rows must not become row 0
        return round(len(rows) * max(0, 100 + percent if text.startswith("-") else percent) / 100)

    return rows[index(start) : index(stop)]


def _read_files(paths: list[Path], result: Rows) -> None:
    for path in paths:
        before = len(result.rows) + len(result.bad)
        try:
            for row in READERS[kind_of(path)](path):
                (result.rows if isinstance(row, Row) else result.bad).append(row)  # type: ignore[arg-type]
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        if len(result.rows) + len(result.bad) == before:
            raise DataError(f"{path} holds no rows")
        result.sources.append(str(path))


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """(line number from 1, text), text None where the bytes are not UTF-8."""
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                yield number, None


def _read_json_lines(path: Path) -> Iterator[Row | BadRow]:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if line is None:
            yield BadRow(where, "is not UTF-8 text")
        elif line.strip():
            yield _json_row(line, where)


def _json_row(text: str, where: str) -> Row | BadRow:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(where, f"is not JSON: {error}")
    return _row(value, where)


def _row(value: Any, where: str) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(where, f"must be a JSON object with columns, not {kind_named(value)}")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair; no tokenizer takes it
        return BadRow(where, "holds half a character (an escape such as \\ud83d without its other half)")
    except RecursionError:
        return BadRow(where, "is nested too deeply")
    return Row(value, where)


def _read_json(path: Path) -> Iterator[Row | BadRow]:
    """A JSON array of objects; a file that holds JSON lines under this ending is read as such."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(path)
        return
    decoder = json.JSONDecoder()
    position = text.index("[") + 1
    line, counted = 1, 0
    while True:
        position = _skip(text, position, " \t\r\n,")
        line, counted = line + text.count("\n", counted, position), position
        if position >= len(text):
            raise DataError(f"{path}:{line}: the JSON array is not closed")
        if text[position] == "]":
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: is not JSON: {error}") from error
        yield _row(value, f"{path}:{line}")
    if text[position + 1 :].strip():
        raise DataError(
            f"{path}:{line}: there is more behind the JSON array", "one array a file, or JSON lines (.jsonl)"
        )


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _text(path: Path) -> str:
    with _open(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: is not UTF-8 text", "save the file as UTF-8") from error


def _read_text(path: Path) -> Iterator[Row | BadRow]:
    """A text file is one row: running text."""
    text = _text(path)
    if text.strip():
        yield Row({"text": text}, str(path))


def _read_csv(path: Path) -> Iterator[Row | BadRow]:
    yield from _read_table(path, delimiter=",", quoting=csv.QUOTE_MINIMAL, strict=True)


def _read_tsv(path: Path) -> Iterator[Row | BadRow]:
    yield from _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_table(path: Path, **dialect: Any) -> Iterator[Row | BadRow]:
    csv.field_size_limit(1 << 27)
    reader = csv.reader(_decoded(path), **dialect)
    header: list[str] | None = None
    line = 1
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{line}: {error}") from error
        where, line = f"{path}:{line}", reader.line_num + 1
        if not values:
            continue
        if header is None:
            header = _header(values, where)
        elif len(values) != len(header):
            yield BadRow(where, f"has {len(values)} fields where the header has {len(header)}")
        else:
            yield Row(dict(zip(header, values, strict=True)), where)


def _header(values: list[str], where: str) -> list[str]:
    if len(set(values)) != len(values) or not all(values):
        raise DataError(f"{where}: the header needs a different name for every column, not {values}")
    return values


def _decoded(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if line is None:
            raise DataError(f"{path}:{number}: is not UTF-8 text", "save the file as UTF-8")
        yield line


def _read_parquet(path: Path) -> Iterator[Row | BadRow]:
    import tempfile

    from datasets import Dataset, disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # it tells of an error before it raises it
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # pyarrow's errors have no common parent here
            raise DataError(f"{path} cannot be read as Parquet: {first_line(error)}") from error
        for number, columns in enumerate(table, start=1):
            yield Row(columns, f"{path} row {number}")


READERS: dict[str, Callable[[Path], Iterable[Row | BadRow]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


def _read_hub(path: str, name: str | None, split: str, result: Rows) -> None:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    try:
        table = load_dataset(path, name, split=split)
    except Exception as error:  # datasets raises whatever its builders raise
        raise DataError(
            f"there is no file {path}, and no data set of that name could be loaded from the hub ({first_line(error)})",
            similar(Path(path)) if os.path.isdir(os.path.dirname(path) or ".") else None,
        ) from error
    result.sources.append(f"{path} ({split})")
    for number, columns in enumerate(table, start=1):
        result.rows.append(Row(dict(columns), f"{path}[{split}] row {number}"))


def raise_bad_rows(bad: list[BadRow], total: int, cure: str = "mend them, or set dataset.on_bad_row: skip") -> None:
    """One error for all bad rows, naming the first ones."""
    shown = "\n".join(f"    {row}" for row in _in_order(bad)[:SHOWN_BAD_ROWS])
    more = f"\n    ... and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    raise DataError(f"{len(bad)} of {total} rows cannot be used\n{shown}{more}", cure)


def _in_order(bad: list[BadRow]) -> list[BadRow]:
    """File by file; those of a file by line, whether they could not be read or not be used."""
    files: dict[str, int] = {}

    def place(row: BadRow) -> tuple[int, int]:
        match = _PLACE.fullmatch(row.where)
        file, number = (match["file"], int(match["number"])) if match else (row.where, 0)
        return files.setdefault(file, len(files)), number

    return sorted(bad, key=place)
