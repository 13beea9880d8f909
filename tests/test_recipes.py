"""Every recipe that ships loads; those that can run offline are run, from the folder above ``recipes``."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lora_cli.recipe import load_recipe
from tests.readme import ROOT

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path.name != "skypilot.yaml")
CLUSTERS = ["multi-node.slurm", "skypilot.yaml"]


def test_there_are_recipes():
    names = {"quickstart", "smoke", "sst2-roberta", "smollm2-chat", "llama3-8b", "llama3-8b-many"}
    assert {path.stem for path in RECIPES} == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path):
    assert load_recipe(path).recipe.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("name", ["smollm2-chat", "llama3-8b", "llama3-8b-many"])
def test_hub_recipes_adapt_all_seven_projections(name):
    targets = load_recipe(ROOT / "recipes" / f"{name}.yaml").recipe.lora.target_modules
    assert targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_smoke_runs_and_its_loss_falls(lora, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    result = lora("train", "recipes/smoke.yaml", f"output_dir={tmp_path / 'smoke'}", "--json")
    assert result.code == 0, result.err
    assert result.json["after"]["loss"] < result.json["before"]["loss"]


def test_quickstart_model_is_at_most_4_megabytes_and_its_held_out_rows_are_new():
    folder = ROOT / "recipes" / "quickstart"
    assert (folder / "model" / "model.safetensors").stat().st_size <= 4_000_000
    train, held_out = (set(_lines(folder / f"{name}.jsonl")) for name in ("train", "heldout"))
    assert len(train) >= 500
    assert len(held_out) >= 100
    assert not train & held_out


def script_of(name: str) -> str:
    text = (ROOT / "recipes" / name).read_text(encoding="utf-8")
    return yaml.safe_load(text)["run"] if name.endswith(".yaml") else text


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_clusters_script_gives_torchrun_and_lora_what_they_take(name, monkeypatch):
    """Up to the variables that only the cluster sets."""
    from torch.distributed.run import get_args_parser

    monkeypatch.chdir(ROOT)
    (command,) = re.findall(r"torchrun (.*?-m lora_cli .*?)(?: &|$)", script_of(name).replace("\\\n", " "), re.M)
    words = ["8" if word.startswith("$") and word.isupper() else word for word in shlex.split(command)]
    options, rest = get_args_parser().parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")]
    assert (options.module, options.training_script, options.rdzv_backend) == (True, "lora_cli", "c10d")
    verb, recipe, *overrides = options.training_script_args
    assert verb == "train"
    assert load_recipe(Path(recipe), overrides).recipe.training.global_batch_size == 64


def test_the_slurm_script_waits_for_the_one_that_its_recipe_writes():
    recipe = load_recipe(ROOT / "recipes" / "llama3-8b-many.yaml").recipe
    assert f"{recipe.output_dir}/summary.json" in script_of("multi-node.slurm")


def test_the_skypilot_task_keeps_the_output_folder():
    task = yaml.safe_load((ROOT / "recipes" / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task["num_nodes"] == 2
    assert list(task["file_mounts"]) == ["~/sky_workdir/runs"], "where workdir lies, and output_dir in it"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
