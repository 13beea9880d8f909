"""The README says what the program does."""

import re
import shlex

import pytest
import yaml

from lora_cli.cli import app
from lora_cli.recipe.schema import Recipe
from tests.readme import ORDER, README, ROOT, current

TEXT = README.read_text(encoding="utf-8")


def test_key_table_and_tree_are_current():
    assert current(TEXT) == TEXT, "run `python -m tests.readme`"


def test_tree_shows_every_file():
    files = {path.name for path in (ROOT / "lora_cli").iterdir() if path.name not in ("__init__.py", "__pycache__")}
    assert files == set(ORDER)
    shown = TEXT.split("<!-- tree -->")[1].split("<!-- /tree -->")[0]
    for path in (ROOT / "lora_cli").rglob("*.py"):
        name = f"{path.parent.name}/" if path.name == "__init__.py" else path.name
        assert re.search(rf"^ *{re.escape(name)}(\s|$)", shown, flags=re.MULTILINE), path


def test_every_package_has_an_init_file_so_that_it_is_installed():
    folders = {path.parent for path in (ROOT / "lora_cli").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_the_ten_line_recipe_is_a_recipe():
    blocks = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        values = yaml.safe_load(block.replace("2e-4", "0.0002"))
        values["model"], values["dataset"] = {"path": values["model"]}, values["dataset"]
        values["dataset"]["path"] = [values["dataset"]["path"]]
        assert Recipe.model_validate(values).lora.lora_alpha == 32


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^\$? ?(lora [a-z][^\n#]*)", TEXT, flags=re.MULTILINE))))
def test_every_command_shown_exists(line):
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert shlex.split(line)[1] in names


def test_the_error_shown_is_the_error_printed(tmp_path, monkeypatch, lora):
    """The README's example of an error, word for word."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "model: x\ndataset: d\noutput_dir: o\n\nlora:\n  r: -3\n\n\ntraining:\n  num_epoch: 3\n", encoding="utf-8"
    )
    shown = re.search(r"```\n(error: recipe.yaml has 2 mistakes.*?)```", TEXT, flags=re.DOTALL)
    assert lora("check", "recipe.yaml").err == shown[1]
