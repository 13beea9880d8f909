"""The output folder: what a finished run leaves, and that it can be read by us and by others."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from lora_cli.commands import rows as rows_module
from lora_cli.commands.output import OutputFolder
from lora_cli.commands.train import train
from lora_cli.errors import UsageError
from lora_cli.recipe import load_recipe
from lora_cli.report.training import Silence
from lora_cli.storage import is_intact
from tests.conftest import CHATML, labelled_rows, write_jsonl


@pytest.fixture
def finished(recipe, tmp_path) -> Callable[..., Path]:
    """``finished(**changes)`` trains and returns the output folder."""

    def go(**changes: Any) -> Path:
        return train(load_recipe(recipe(**changes)), Silence()).output.root

    return go


def test_a_finished_run_leaves_exactly_these_files(finished):
    folder = finished(**{"dataset.eval_size": 4})
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith("checkpoints/")} == {
        ".lock",
        "recipe.yaml",
        "resolved.yaml",
        "metrics.jsonl",
        "summary.json",
        *(
            f"adapter/{name}"
            for name in (
                "adapter_config.json",
                "adapter_model.safetensors",
                "chat_template.jinja",
                "manifest.json",
                "provenance.json",
                "README.md",
                "tokenizer.json",
                "tokenizer_config.json",
            )
        ),
    }
    assert is_intact(folder / "adapter")


def test_the_recipe_is_kept_as_it_was_written(recipe, lora, tmp_path):
    path = recipe()
    path.write_text("# my notes\n" + path.read_text())
    assert lora("train", path).code == 0
    assert (tmp_path / "run" / "recipe.yaml").read_text() == path.read_text()


CHANGES: list[dict[str, Any]] = [
    {},
    {"dataset.eval_size": 4, "training.metric_for_best_model": "eval_token_accuracy"},
    {"dataset.eval_size": 0.25, "training.early_stopping_patience": 3, "training.eval_steps": 0.5},
    {"training.max_grad_norm": None, "training.warmup_steps": 2, "training.report_to": ["tensorboard"]},
    {"training.global_batch_size": 3, "training.strategy": "fsdp"},
    {"method": "full", "lora": {}},
    {"method": "head", "lora": {"modules_to_save": ["layers.0.mlp"]}},
    {"lora.rank_pattern": {"q_proj": 2}, "lora.alpha_pattern": {"q_proj": 3.5}, "lora.exclude_modules": ["v_proj"]},
    {"lora.init_lora_weights": "gaussian", "lora.use_rslora": True, "lora.layers_to_transform": [1]},
    {"dataset.system_prompt": "Be brief: yes, no, 1e-4.", "dataset.train_on_prompt": True, "dataset.too_long": "skip"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: ",".join(changes) or "default")
def test_the_resolved_recipe_is_a_recipe_and_says_the_same(recipe, finished, changes):
    resolved = load_recipe(finished(**changes) / "resolved.yaml").recipe
    assert resolved == load_recipe(recipe(**changes)).recipe


def test_the_resolved_recipe_of_a_classifier_and_of_a_random_base_can_be_loaded_too(recipe, model_folder, tmp_path):
    rows = write_jsonl(tmp_path / "labelled.jsonl", labelled_rows(16))
    config = json.loads((model_folder("llama") / "config.json").read_text())
    inline = {key: config[key] for key in ("model_type", "vocab_size", "hidden_size", "num_attention_heads")}
    inline |= {"intermediate_size": 48, "num_hidden_layers": 1, "num_key_value_heads": 2}
    base = {"config": inline, "tokenizer": str(model_folder("llama"))}
    path = recipe(task="sequence_classification", model=base, **{"dataset.path": str(rows)})
    folder = train(load_recipe(path), Silence()).output.root
    assert load_recipe(folder / "resolved.yaml").recipe == load_recipe(path).recipe


def test_overrides_stand_in_the_resolved_recipe_and_every_default_is_filled_in(recipe, lora, tmp_path):
    assert lora("train", recipe(), "training.learning_rate=0.005", "training.max_steps=2").code == 0
    text = (tmp_path / "run" / "resolved.yaml").read_text()
    values = yaml.safe_load(text)
    assert values["training"]["learning_rate"] == 0.005
    assert values["training"]["adam_beta2"] == 0.999
    assert values["lora"]["lora_alpha"] == 8.0
    for name in ("lora-cli", "torch", "transformers", "datasets", "python"):
        assert f"# {name} " in text
    assert "# dtype float32 on cpu, base commit none" in text


def test_training_the_resolved_recipe_gives_the_same_adapter(recipe, lora, tmp_path):
    changes = {"training.max_grad_norm": None, "dataset.eval_size": 4}
    assert lora("train", recipe(**changes)).code == 0
    again = lora("train", tmp_path / "run" / "resolved.yaml", f"output_dir={tmp_path / 'again'}")
    assert again.code == 0, again.err
    first, second = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_the_summary_is_the_json_that_the_command_prints(recipe, lora, tmp_path):
    result = lora("train", recipe(**{"dataset.eval_size": 4}), "--json")
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == result.json
    assert set(result.json) == {
        "loftq",
        "before",
        "after",
        "metric_for_best_model",
        "best_step",
        "steps",
        "total_steps",
        "epochs",
        "stopped_early",
        "train_loss",
        "tokens",
        "tokens_per_second",
        "train_seconds",
        "peak_memory_bytes",
        "processes",
        "parameters",
        "rows",
        "device",
        "dtype",
        "result",
        "versions",
    }


def test_files_are_readable_by_whom_the_umask_allows(finished):
    """safetensors writes with mode 0600, which a web server or a colleague could not read."""
    mask = os.umask(0o027)
    try:
        folder = finished()
    finally:
        os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_no_pickle_and_no_private_file_is_left(finished):
    folder = finished(**{"training.save_steps": 1})
    names = [path.name for path in folder.rglob("*")]
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".part", ".old"))]


def test_the_adapters_metadata_and_configuration_are_those_of_peft(finished):
    folder = finished() / "adapter"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)


def test_the_model_card_tells_base_rows_and_figures(finished, model_folder):
    card = (finished(**{"dataset.eval_size": 4}) / "adapter" / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {model_folder('llama')}\nlibrary_name: peft\n")
    assert "20 rows of" in card
    assert "4 rows were held out" in card
    assert "| loss | " in card
    assert "PeftModel.from_pretrained" in card


def test_the_tokenizer_goes_along_with_the_template_that_was_trained(finished, tmp_path):
    (tmp_path / "other.jinja").write_text(CHATML.replace("\\n", "\\n\\n"))
    folder = finished(**{"dataset.chat_template": str(tmp_path / "other.jinja")})
    assert (folder / "adapter" / "chat_template.jinja").read_text() == (tmp_path / "other.jinja").read_text()


# --- whose folder it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [[], [".lock"], [".git"], ["resolved.yaml", "anything"], ["earlier-001"]])
def test_an_empty_folder_an_earlier_run_and_hidden_files_can_be_used(tmp_path, entries):
    for name in entries:
        (tmp_path / name).touch()
    OutputFolder(tmp_path, "lora").check_usable()


def test_somebodys_recipe_is_no_run(recipe, lora, tmp_path):
    """Neither written over nor moved."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "recipe.yaml").write_text("mine")
    for flags in ([], ["--fresh"]):
        refused = lora("train", recipe(output_dir=str(home)), *flags)
        assert refused.code == 2
        assert "holds other files (recipe.yaml) and no run of lora" in refused.err
    assert [(path.name, path.read_text()) for path in home.iterdir()] == [("recipe.yaml", "mine")]


def test_a_folder_that_does_not_exist_can_be_used(tmp_path):
    OutputFolder(tmp_path / "a" / "b", "lora").check_usable()
    assert not (tmp_path / "a").exists()


def test_somebody_elses_folder_and_a_file_are_refused(tmp_path):
    for name in "dcba":
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"holds other files \(a, b, c\) and no run of lora"):
        OutputFolder(tmp_path, "lora").check_usable()
    with pytest.raises(UsageError, match="is a file"):
        OutputFolder(tmp_path / "a", "lora").check_usable()


def test_a_folder_with_a_base_of_somebody_else_is_never_written_over(recipe, lora, tmp_path):
    (tmp_path / "run" / "base").mkdir(parents=True)
    (tmp_path / "run" / "base" / "thesis.txt").write_text("years of work")
    assert lora("train", recipe()).code == 2
    assert (tmp_path / "run" / "base" / "thesis.txt").read_text() == "years of work"


def no_rows(*anything: Any) -> None:
    raise AssertionError("rows are read before the output folder was looked at")


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_folder_that_cannot_be_made_is_exit_code_5_before_a_row_is_read(recipe, lora, tmp_path, monkeypatch, command):
    """Permissions do not stop root, so a path below a file stands for an unwritable place."""
    monkeypatch.setattr(rows_module, "read_train", no_rows)
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "deep" / "run"
    result = lora(command, recipe(output_dir=str(target)))
    assert (result.code, result.out) == (5, "")
    assert result.err == f"error: cannot write {target}: {tmp_path / 'file'} is a file\n"


def test_a_folder_without_permission_is_exit_code_5_before_a_row_is_read(recipe, lora, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "read_train", no_rows)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # as for anybody but root
    result = lora("train", recipe())
    assert (result.code, result.out) == (5, "")
    assert result.err == f"error: cannot write {tmp_path / 'run'}: no permission to write in {tmp_path}\n"


def test_a_folder_on_a_full_file_system_is_exit_code_5_with_its_path(recipe, lora):
    """/proc has no space at all."""
    result = lora("train", recipe(output_dir="/proc/nothing/run"))
    assert result.code == 5
    assert "/proc/nothing/run" in result.err


def test_a_folder_that_is_a_file_is_refused(recipe, lora, tmp_path):
    (tmp_path / "run").write_text("not a folder")
    result = lora("train", recipe())
    assert result.code == 2
    assert f"output_dir {tmp_path / 'run'} is a file" in result.err
    assert (tmp_path / "run").read_text() == "not a folder"


def test_a_tilde_is_the_home_folder(recipe, lora, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert lora("train", recipe(output_dir="~/at-home")).code == 0
    assert (tmp_path / "at-home" / "summary.json").is_file()
