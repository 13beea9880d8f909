"""The README's screens are what the program prints, but for figures; and the quickstart keeps its promise."""

from __future__ import annotations

import json
import re

import pytest

from tests.readme import README
from tests.screens import COMMANDS, masked, prepare, printed, shown


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder in which it was trained, and every screen up to there."""
    folder = tmp_path_factory.mktemp("checkout")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, {name: printed(COMMANDS[name]) for name in ("check", "quickstart")}


def test_it_lifts_exact_match_from_below_5_to_above_90_percent(quickstart):
    """The promise of `make demo`: with less than 5 % of the parameters, on rows that training never saw."""
    summary = json.loads((quickstart[0] / "runs/quickstart/summary.json").read_text())
    assert summary["before"]["exact_match"] < 0.05
    assert summary["after"]["exact_match"] >= 0.90
    assert summary["parameters"]["percent"] < 5
    assert summary["rows"] == {"train": 900, "eval": 200}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_screen_in_the_readme_is_the_one_printed(quickstart, name, monkeypatch):
    folder, screens = quickstart
    monkeypatch.chdir(folder)
    text = screens[name] if name in screens else printed(COMMANDS[name])
    (readme,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README.read_text("utf-8"), flags=re.DOTALL)
    assert masked(shown(COMMANDS[name], text)) == masked(readme), "run `python -m tests.screens`"


def test_another_word_or_line_is_another_screen_and_another_figure_is_not():
    block = "peak  575.6 MB  of 24.9 GB\nloss  1.5e-05"
    assert (
        masked(block) == masked("peak  5,575 B  of 1.9 TB\nloss  0.03".replace("TB", "GB")) == ["peak # of #", "loss #"]
    )
    assert masked(block) != masked(block.replace("peak", "most"))
    assert masked(block) != masked(block + "\none more")
