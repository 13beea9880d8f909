"""Every recipe that ships loads; those that can run offline are run, from the folder above ``recipes``."""

from pathlib import Path

import pytest

from lora_cli.recipe import load_recipe
from tests.readme import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} == {"quickstart", "smoke", "sst2-roberta", "smollm2-chat", "llama3-8b"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(path):
    assert load_recipe(path).recipe.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("name", ["smollm2-chat", "llama3-8b"])
def test_hub_recipes_adapt_all_seven_projections(name):
    targets = load_recipe(ROOT / "recipes" / f"{name}.yaml").recipe.lora.target_modules
    assert targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_smoke_runs_and_its_loss_falls(lora, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    result = lora("train", "recipes/smoke.yaml", f"output_dir={tmp_path / 'smoke'}", "--json")
    assert result.code == 0, result.err
    assert result.json["after"]["loss"] < result.json["before"]["loss"]


def test_quickstart_lifts_exact_match_from_below_5_to_above_90_percent(lora, monkeypatch, tmp_path):
    """The promise of `make demo`: with less than 5 % of the parameters, on rows that training never saw."""
    monkeypatch.chdir(ROOT)
    result = lora("train", "recipes/quickstart.yaml", f"output_dir={tmp_path / 'run'}", "--json")
    assert result.code == 0, result.err
    summary = result.json
    assert summary["before"]["exact_match"] < 0.05
    assert summary["after"]["exact_match"] >= 0.90
    assert summary["parameters"]["percent"] < 5
    assert summary["rows"] == {"train": 900, "eval": 200}


def test_quickstart_model_is_at_most_4_megabytes_and_its_held_out_rows_are_new():
    folder = ROOT / "recipes" / "quickstart"
    assert (folder / "model" / "model.safetensors").stat().st_size <= 4_000_000
    train, held_out = (set(_lines(folder / f"{name}.jsonl")) for name in ("train", "heldout"))
    assert len(train) >= 500
    assert len(held_out) >= 100
    assert not train & held_out


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()
