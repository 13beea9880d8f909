"""The door: exit codes, JSON and nothing else, no traceback, a quick help, and a crash log for bugs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from typing import Any

import click
import pytest
import typer

import lora_cli
from lora_cli import errors
from lora_cli.cli import app
from lora_cli.errors import LoraError, Mistake, RecipeError, SeveralErrors, Stopped, ToldElsewhere
from tests.processes import finish, printed, start

COMMANDS = ["train", "check", "count-params", "merge", "inspect", "shrink", "combine", "export", "schema"]
WITH_JSON = ["train", "check", "count-params", "merge", "inspect", "shrink", "combine", "export"]
HEAVY = ("torch", "transformers", "datasets", "numpy", "pydantic", "huggingface_hub", "safetensors", "yaml", "rich")


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


IMPORTED = """
import atexit, sys
from lora_cli.cli import main
atexit.register(lambda: print("IMPORTED", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr))
sys.argv[0] = "lora"
main()
"""


def imported(*arguments: object) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The command line in a process of its own, and the packages that it imported."""
    result = python(IMPORTED, *arguments)
    return result, set(result.stderr.rpartition("IMPORTED")[2].split())


# --- help -----------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy_and_lists_every_command_and_exit_code():
    result, packages = imported("--help")
    assert result.returncode == 0
    assert not packages & set(HEAVY)
    for command in COMMANDS:
        assert f"\n  {command}  " in result.stdout
    told = " ".join(result.stdout.split())
    assert "0 done, 1 a bug, 2 recipe or usage, 3 non-finite loss, 4 out of memory, 5 storage, 6 data, " in told
    assert "7 output folder in use, 128 + n stopped by signal n" in told


def test_a_mistake_in_a_recipe_is_told_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: x\ndataset: y\noutput_dir: z\ntraining:\n  num_epoch: 3\n")
    result, packages = imported("train", tmp_path / "recipe.yaml")
    assert result.returncode == 2
    assert "did you mean num_train_epochs?" in result.stderr
    assert not packages & {"torch", "transformers", "datasets", "numpy", "rich"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_with_all_its_options(lora, command):
    result = lora(command, "--help")
    assert result.code == 0
    declared = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    for parameter in declared:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in result.out
            assert parameter.help, f"{command} {parameter.opts[0]} says nothing"


def test_version_is_the_packages(lora):
    assert lora("--version").out == f"lora {lora_cli.__version__}\n"


def test_without_a_command_the_help_is_shown(lora):
    result = lora()
    assert "Commands:" in result.out + result.err


def test_the_module_runs_as_the_command_does():
    result = subprocess.run([sys.executable, "-m", "lora_cli", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"lora {lora_cli.__version__}\n")


# --- usage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "recipe.yaml", "--nonsense"], "No such option: --nonsense"),
        (["train", "missing.yaml"], "there is no recipe missing.yaml"),
        (["check", "missing.yaml"], "there is no recipe missing.yaml"),
        (["merge", "missing", "-o", "target"], "there is no folder missing"),
        (["merge", "missing", "--dtype", "int3"], "--dtype int3 is not known"),
        (["count-params", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_nothing_on_stdout(lora, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = lora(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("override", ["training.learning_rate", "=3", "training..x=1", "training.lerning_rate=1"])
def test_an_override_that_is_wrong_is_named(lora, recipe, override):
    result = lora("check", recipe(), override)
    assert result.code == 2
    assert override in result.err


# --- errors ---------------------------------------------------------------------------------------------------


def tree(root: type[LoraError] = LoraError) -> list[type[LoraError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in tree(child))]


EXAMPLES: dict[str, LoraError] = {
    "RecipeError": RecipeError([Mistake(("lora", "r"), "must be 1 or more")]),
    "SeveralErrors": SeveralErrors([errors.DataError("first"), errors.UsageError("second")]),
    "Stopped": Stopped(signal.SIGTERM, "stopped by SIGTERM after step 3"),
    "ToldElsewhere": ToldElsewhere(4),
}
CODES = {
    "LoraError": 2,
    "UsageError": 2,
    "RecipeError": 2,
    "NonFiniteError": 3,
    "OutOfMemoryError": 4,
    "StorageError": 5,
    "DataError": 6,
    "FolderInUseError": 7,
    "SeveralErrors": 6,
    "LostProcessError": 1,
    "Stopped": 143,
    "ToldElsewhere": 4,
}


def test_every_error_of_the_tree_has_its_exit_code_here():
    assert {kind.__name__ for kind in tree()} == set(CODES)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def load(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("lora_cli.recipe.load_recipe", load)


@pytest.mark.parametrize("kind", tree(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("as_json", [False, True])
def test_every_error_becomes_a_message_and_its_exit_code(lora, monkeypatch, kind, as_json):
    error = EXAMPLES.get(kind.__name__) or kind("it broke", "mend it")
    fail_with(monkeypatch, error)
    result = lora("train", "recipe.yaml", *(["--json"] if as_json else []))
    assert result.code == CODES[kind.__name__]
    if kind is ToldElsewhere:
        assert (result.out, result.err) == ("", "")
        return
    assert str(error) in result.err
    assert "Traceback" not in result.err
    if as_json:
        assert result.json == {"error": {"exit_code": result.code, "kind": kind.__name__, "message": str(error)}}
    else:
        assert result.out == ""


def test_an_error_says_error_and_a_stop_that_was_asked_for_does_not(lora, monkeypatch):
    fail_with(monkeypatch, errors.DataError("it broke", "mend it"))
    assert lora("check", "x").err == "error: it broke\n    help: mend it\n"
    fail_with(monkeypatch, EXAMPLES["Stopped"])
    assert lora("check", "x").err == "stopped by SIGTERM after step 3\n"


def test_an_interrupt_is_exit_code_130_without_a_traceback(lora, monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    result = lora("check", "x")
    assert (result.code, result.err) == (130, "error: interrupted\n")


def test_debug_shows_the_traceback_of_an_error(lora, monkeypatch):
    fail_with(monkeypatch, errors.DataError("it broke"))
    result = lora("check", "x", "--debug")
    assert result.code == 6
    assert "Traceback (most recent call last)" in result.err
    assert "DataError: it broke" in result.err


# --- bugs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_a_bug_is_exit_code_1_with_a_crash_log_at_the_printed_path(lora, monkeypatch, tmp_path, as_json):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fail_with(monkeypatch, ZeroDivisionError("surprise"))
    result = lora("train", "x", *(["--json"] if as_json else []))
    assert result.code == 1
    assert "this is a bug in lora: ZeroDivisionError: surprise" in result.err
    assert "Traceback" not in result.err
    (log,) = tmp_path.glob("lora-crash-*.log")
    assert f"crash log: {log}" in result.err
    text = log.read_text()
    assert f"lora {lora_cli.__version__}, Python " in text
    assert "Traceback (most recent call last)" in text
    assert "ZeroDivisionError: surprise" in text
    if as_json:
        assert result.json["error"]["exit_code"] == 1
        assert result.json["error"]["kind"] == "ZeroDivisionError"
    else:
        assert result.out == ""


def test_a_crash_log_that_cannot_be_written_does_not_hide_the_bug(lora, monkeypatch):
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    fail_with(monkeypatch, ZeroDivisionError("surprise"))
    result = lora("train", "x")
    assert result.code == 1
    assert "this is a bug in lora: ZeroDivisionError: surprise" in result.err
    assert "Traceback" not in result.err


# --- JSON -----------------------------------------------------------------------------------------------------


def test_json_is_one_document_and_nothing_else_for_every_command_that_reports(lora, recipe, tmp_path):
    """``Result.json`` parses all of stdout, so one more word would fail."""
    path = recipe(**{"dataset.eval_size": 4})
    assert lora("check", path, "--json").json["steps"] == 4
    assert lora("train", path, "--json").json["steps"] == 4
    assert lora("train", path, "--json").json["steps"] == 4, "finished already"
    assert lora("count-params", path, "--json").json["learnable"] > 0
    assert lora("merge", tmp_path / "run" / "adapter", "--json").json["within_limit"] is True
    adapter = tmp_path / "run" / "adapter"
    assert lora("inspect", adapter, adapter, "--json").json["difference"]["only_there"] == []
    assert lora("shrink", adapter, "--rank", 2, "-o", tmp_path / "small", "--json").json["energy"] < 1
    both = lora("combine", adapter, adapter, "--weights", "0.5,0.5", "-o", tmp_path / "both", "--json")
    assert both.json["distance_from_sum"] < 1e-6
    assert lora("export", adapter, "--for", "vllm", "--json").json["agreement"]["top1_agreement"] > 0.9
    declared = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert [name for name, command in declared.items() if "as_json" in {p.name for p in command.params}] == WITH_JSON


def test_the_schema_is_json_by_itself_and_a_table_on_demand(lora):
    assert lora("schema").json["required"] == ["model", "dataset", "output_dir"]
    table = lora("schema", "--markdown").out
    assert table.startswith("| key | default | meaning |")
    assert "| `training.learning_rate` | `0.0002` |" in table


def test_nothing_but_json_reaches_the_descriptors_of_a_process(recipe, tmp_path):
    """Progress bars and warnings of libraries would be written there, past Python's own streams."""
    assert finish(start(tmp_path, "train", recipe(), "--json")) == 0
    assert json.loads(printed(tmp_path, "stdout")) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert printed(tmp_path) == ""


# --- pipes ----------------------------------------------------------------------------------------------------


def test_a_reader_that_went_away_is_no_error():
    command = f"{sys.executable} -m lora_cli schema | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", ["check", "count-params"])
def test_a_reader_that_went_away_is_no_error_for_a_screen_drawn_with_rich(recipe, tmp_path, command):
    process = start(tmp_path, command, recipe(), deaf=True)
    assert (finish(process), printed(tmp_path)) == (0, "")


def test_a_run_whose_reader_went_away_is_quiet_and_says_0_only_if_it_is_done(recipe, tmp_path):
    code = finish(start(tmp_path, "train", recipe(), deaf=True))
    assert printed(tmp_path) == ""
    assert (code == 0) is (tmp_path / "run" / "summary.json").is_file()


def test_a_pipe_gets_no_colour_and_no_control_character(lora, recipe):
    out = lora("check", recipe()).out + lora("train", recipe()).out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)


def test_the_screen_needs_no_utf8_terminal(recipe, tmp_path):
    """The curve is drawn with braille; where the encoding has none, a finished run must not end in a crash."""
    assert finish(start(tmp_path, "train", recipe(), encoding="ascii")) == 0, printed(tmp_path)
    assert (tmp_path / "run" / "summary.json").is_file()
