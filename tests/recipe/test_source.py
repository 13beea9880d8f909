"""Mistakes shown at their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.errors import Mistake, RecipeError
from lora_cli.recipe import load_recipe
from lora_cli.recipe.source import FRAME_WIDTH, Place, Source, Span

START = "model: m\ndataset: d.jsonl\noutput_dir: o\n"


def told(text: str, tmp_path: Path, *overrides: str, newline: str = "\n") -> str:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.replace("\n", newline).encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_value_is_underlined_and_named(tmp_path: Path):
    assert told(START + "lora: {r: 0}\n", tmp_path) == (
        "recipe.yaml has 1 mistake\n"
        "  --> recipe.yaml:4:8\n"
        "  4 | lora: {r: 0}\n"
        "    |           ^ lora.r must be 1 or more"
    )


def test_an_unknown_key_is_underlined_itself(tmp_path: Path):
    assert told(START + "lora:\n  rank: 4\n", tmp_path) == (
        "recipe.yaml has 1 mistake\n"
        "  --> recipe.yaml:5:3\n"
        "  5 |   rank: 4\n"
        "    |   ^^^^ unknown key in lora\n"
        "    help: did you mean lora.r?"
    )


def test_a_missing_key_of_a_section_points_at_the_section(tmp_path: Path):
    assert told("model: m\noutput_dir: o\ndataset:\n  name: x\n", tmp_path) == (
        "recipe.yaml has 1 mistake\n  --> recipe.yaml:3:1\n  3 | dataset:\n    | ^^^^^^^ dataset.path is required"
    )


def test_a_missing_section_has_no_line(tmp_path: Path):
    assert told("model: m\ndataset: d\n", tmp_path) == (
        "recipe.yaml has 1 mistake\n  --> recipe.yaml\n    | output_dir is required"
    )


def test_an_argument_is_named(tmp_path: Path):
    assert told(START, tmp_path, "lora.r=0") == (
        "recipe.yaml has 1 mistake\n  --> argument lora.r=0\n    | lora.r must be 1 or more"
    )


def test_a_shorthand_has_its_own_place(tmp_path: Path):
    assert told("model: [a]\ndataset: d\noutput_dir: o\n", tmp_path) == (
        "recipe.yaml has 1 mistake\n"
        "  --> recipe.yaml:1:1\n"
        "  1 | model: [a]\n"
        "    |        ^^^ model.path must be a text, not a list"
    )


def test_an_argument_that_replaces_a_section_is_the_place_of_what_it_lacks(tmp_path: Path):
    """Not the line of the file where the key stood before."""
    text = "model: m\ndataset: {path: x}\noutput_dir: o\n"
    assert told(text, tmp_path, "dataset={name: y}") == (
        "recipe.yaml has 1 mistake\n  --> argument dataset={name: y}\n    | dataset.path is required"
    )


def test_an_argument_for_another_key_is_not_the_place_of_what_a_section_lacks(tmp_path: Path):
    assert told("model: m\noutput_dir: o\ndataset:\n  name: x\n", tmp_path, "dataset.max_length=5") == (
        "recipe.yaml has 1 mistake\n  --> recipe.yaml:3:1\n  3 | dataset:\n    | ^^^^^^^ dataset.path is required"
    )


def test_mistakes_come_in_the_order_of_lines_with_arguments_last(tmp_path: Path):
    text = "output_dir: o\ntraining: {seed: -1}\nlora: {r: 0}\nmodel: m\ndataset: {path: x, max_length: 1}\n"
    places = [line for line in told(text, tmp_path, "task=x").splitlines() if "-->" in line]
    assert places == [
        "  --> recipe.yaml:2:12",
        "  --> recipe.yaml:3:8",
        "  --> recipe.yaml:5:20",
        "  --> argument task=x",
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r", "\u2028", "\x85"])
def test_lines_are_counted_as_yaml_does(newline: str, tmp_path: Path):
    frame = told("model: m\n# a\n\ndataset: d\noutput_dir: o\nlora: {r: 0}\n", tmp_path, newline=newline)
    assert "recipe.yaml:6:8\n  6 | lora: {r: 0}\n" in frame


def test_a_long_line_is_cut_and_the_caret_stays_in_it(tmp_path: Path):
    for indent in (10, 99, 100, 500):
        text = START + f"lora: {{r: 1, {' ' * indent}use_rslora: 3}}\n"
        line, caret = told(text, tmp_path).splitlines()[2:4]
        assert len(line) == len("  4 | ") + FRAME_WIDTH or indent == 10
        position = min(text.splitlines()[3].index("3}"), FRAME_WIDTH)
        assert caret == f"    | {' ' * position}^ lora.use_rslora must be true or false, not 3"


def test_a_value_over_several_lines_gets_one_caret(tmp_path: Path):
    assert "  4 | task: 'a\n    |       ^ task must be" in told(START + "task: 'a\n\n  b'\n", tmp_path)


def test_the_nearest_known_place():
    inner = Place(Span(1, 2, 3), Span(1, 5, 1))
    source = Source("r", ["a:", "  b: [1]"], {("a", "b"): inner})
    assert source.place(("a", "b", 0, "c")) == inner
    assert source.place(("a", "x")) == Place()
    assert source.was_given("a", "b")
    assert not source.was_given("a", "c")


def test_without_a_source_mistakes_are_a_plain_list():
    error = RecipeError([Mistake(("a", "b"), "is wrong", "do this"), Mistake(("c",), "too")])
    assert str(error) == "a.b: is wrong\n    help: do this\nc: too"
