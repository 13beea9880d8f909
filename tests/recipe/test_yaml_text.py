"""Scalars as people mean them, and a mistake with a place for everything that is no plain data."""

from __future__ import annotations

from typing import Any

import pytest

from lora_cli.errors import Mistake
from lora_cli.recipe.source import Place, Source, Span
from lora_cli.recipe.yaml_text import MAX_DEPTH, MAX_NODES, Mistakes, parse_yaml


def parse(text: str, argument: str | None = None) -> Any:
    return parse_yaml(text, Source("recipe.yaml", text.splitlines()), argument=argument)


def refused(text: str) -> tuple[list[Mistake], Source]:
    source = Source("recipe.yaml", text.splitlines())
    with pytest.raises(Mistakes) as caught:
        parse_yaml(text, source)
    return caught.value.mistakes, source


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),  # a text in PyYAML
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.e3", 1e3),
        (".5", 0.5),
        ("-.5e+2", -50.0),
        ("5.", 5.0),
        ("no", "no"),  # false in PyYAML
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("True", True),
        ("false", False),
        ("tRue", "tRue"),
        ("010", 10),  # 8 in PyYAML
        ("+7", 7),
        ("-7", -7),
        ("0x10", "0x10"),
        ("1_000", "1_000"),  # 1000 in PyYAML
        ("1:30", "1:30"),  # 90 in PyYAML
        ("2001-12-14", "2001-12-14"),  # a date in PyYAML
        ("2001-99-99", "2001-99-99"),  # a ValueError in PyYAML
        ("'3'", "3"),
        ('"3"', "3"),
        ("~", None),
        ("null", None),
        ("", None),
        ("nil", "nil"),
        ("train[:10]", "train[:10]"),
        ("re:.*q_proj", "re:.*q_proj"),
        ("[a, 1, 1.0, null]", ["a", 1, 1.0, None]),
        ("{a: {b: [c]}}", {"a": {"b": ["c"]}}),
        ("a: |\n  two\n  lines\n", {"a": "two\nlines\n"}),
        ("a: &x [1]\nb: *x\n", {"a": [1], "b": [1]}),
        ("1: a\ntrue: b\nnull: c\n", {"1": "a", "true": "b", "null": "c"}),
        ("a: 日本 😀\n", {"a": "日本 😀"}),
    ],
)
def test_values(text: str, value: Any):
    got = parse(text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message", "line", "column"),
    [
        ("a: 1\nb: 2\na: 3\n", "a is given twice (first on line 1)", 3, 1),
        ("x: {a: 1, a: 1}", "a is given twice (first on line 1)", 1, 11),
        ("a: .inf", "must be a finite number, not .inf", 1, 1),
        ("a: -.Inf", "must be a finite number, not -.Inf", 1, 1),
        ("a: .NAN", "must be a finite number, not .NAN", 1, 1),
        ("a: 1e999", "must be a finite number, not 1e999", 1, 1),
        ("a: [1, .inf]", "must be a finite number, not .inf", 1, 8),
        ("a: " + "9" * 5000, "cannot be read as int", 1, 1),
        ("a: !!python/object:os.system x", "has the tag tag:yaml.org,2002:python/object:os.system", 1, 1),
        ("a: !mine {b: 1}", "has the tag !mine", 1, 1),
        ("a: !!binary aGk=", "has the tag tag:yaml.org,2002:binary", 1, 1),
        ("a: !!int x", "cannot be read as int", 1, 1),
        ("? [a]\n: 1\n", "a key must be a plain text", 1, 3),
        ("? {a: b}\n: 1\n", "a key must be a plain text", 1, 3),
        ('"\\0": 1', "a key must be a plain text", 1, 1),
        ('a: "\\ud800"', "holds an escape that is no character", 1, 1),
        ('a: "x\\0y"', "holds an escape that is no character", 1, 1),
        ("a:\n\tb: 1\n", "this is not YAML: while scanning for the next token, found character '\\t'", 2, 1),
        ("a: [1, 2\nb: 3\n", "this is not YAML: ", 2, 2),
        ("a: 'x\n", "this is not YAML: while scanning a quoted scalar, found unexpected end of stream", 2, 1),
        ("a: b: c\n", "this is not YAML: mapping values are not allowed here", 1, 5),
        ("a: *x\n", "this is not YAML: found undefined alias 'x'", 1, 4),
        ("a: 1\n---\nb: 2\n", "this is not YAML: expected a single document in the stream", 2, 1),
        ("a: 1\nb: x\x07y\n", "this is not YAML: the character U+0007 is not allowed", 2, 5),
        ("%YAML 2.0\n---\na: 1\n", "this is not YAML: found incompatible YAML document", 1, 1),
    ],
)
def test_refusals(text: str, message: str, line: int, column: int):
    """Each with its message, and the place where it stands."""
    mistakes, source = refused(text)
    assert [m.message[: len(message)] for m in mistakes] == [message]
    key = source.place(mistakes[0].path).key
    assert key is not None
    assert (key.line + 1, key.column + 1) == (line, column)


@pytest.mark.parametrize(
    "text",
    ['a: "\\UFFFFFFFF"', 'a: "\\U00110000"', "%YAML " + "9" * 5000 + ".1\n---\na: 1\n", "a: %\n", "!<", "&", "%TAG"],
)
def test_what_pyyaml_converts_unchecked(text: str):
    """PyYAML raises OverflowError and ValueError for these; here they are mistakes, too."""
    mistakes, _ = refused(text)
    assert "not YAML" in mistakes[0].message


def test_every_mistake_is_told_at_once():
    mistakes, _ = refused("a: .inf\nb: 1\nb: 2\nc: !x 1\n")
    assert [m.name for m in mistakes] == ["a", "b", "c"]


def test_an_alias_in_place_of_a_glob_is_explained():
    mistakes, _ = refused("target_modules: *_proj\n")
    assert mistakes[0].help == "write a text that begins with * in quotes"


@pytest.mark.parametrize("nest", ["[", "{a: ", "- "])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 5, 3000])
def test_deep_nesting(nest: str, depth: int):
    closing = {"[": "]", "{a: ": "}", "- ": "x"}[nest]
    text = nest * depth + (closing if nest == "- " else "1" + closing * depth)
    mistakes, _ = refused(text)
    assert mistakes[0].message == f"is nested deeper than {MAX_DEPTH} levels"


def test_the_deepest_nesting_that_is_taken():
    assert parse("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH) is not None


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}"])
def test_an_alias_of_itself(text: str):
    mistakes, _ = refused(text)
    assert (mistakes[0].name, mistakes[0].message) == ("a", f"is nested deeper than {MAX_DEPTH} levels")


def test_billion_laughs():
    """Ten lines that stand for 9**10 values are refused after 20,000 of them."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    mistakes, _ = refused("\n".join(lines))
    assert (mistakes[0].name, mistakes[0].message) == ("a4", "holds more than 20000 values")


def test_the_most_values_that_are_taken():
    """The list itself is one of them."""
    assert len(parse("[" + "1," * (MAX_NODES - 1) + "]")) == MAX_NODES - 1
    refused("[" + "1," * MAX_NODES + "]")


def test_places_of_keys_and_values():
    text = "a: 1\nb:\n  c: hello # c\n  d: [x, y]\n"
    source = Source("recipe.yaml", text.splitlines())
    parse_yaml(text, source)
    assert source.places == {
        ("a",): Place(Span(0, 0, 1), Span(0, 3, 1)),
        ("b",): Place(Span(1, 0, 1), Span(2, 2, 1)),
        ("b", "c"): Place(Span(2, 2, 1), Span(2, 5, 5)),
        ("b", "d"): Place(Span(3, 2, 1), Span(3, 5, 6)),
        ("b", "d", 0): Place(Span(3, 6, 1), Span(3, 6, 1)),
        ("b", "d", 1): Place(Span(3, 9, 1), Span(3, 9, 1)),
    }


def test_an_arguments_keys_stand_in_the_argument():
    source = Source("recipe.yaml", [])
    assert parse_yaml("{a: [1]}", source, at=("x",), argument="x={a: [1]}") == {"a": [1]}
    assert set(source.places) == {("x", "a"), ("x", "a", 0)}
    assert {place.argument for place in source.places.values()} == {"x={a: [1]}"}
