"""pydantic's findings in the words a user reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.errors import Mistake, RecipeError
from lora_cli.recipe import load_recipe
from lora_cli.recipe.messages import FOREIGN_KEYS, all_keys, section_keys

START = "model: m\ndataset: d.jsonl\noutput_dir: o\n"


def mistakes(text: str, tmp_path: Path) -> list[Mistake]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    return caught.value.mistakes


@pytest.mark.parametrize(
    ("line", "help"),
    [
        ("trainng: {}", "did you mean training?"),
        ("Task: causal_lm", "did you mean task?"),
        ("training: {num_epoch: 3}", "did you mean num_train_epochs?"),
        ("training: {learning_rat: 3}", "did you mean learning_rate?"),
        ("training: {lora_alpha: 3}", "did you mean lora.lora_alpha?"),
        ("lora: {max_length: 3}", "did you mean dataset.max_length?"),
        ("learning_rate: 3", "did you mean training.learning_rate?"),
        ("lora: {alpha: 3}", "did you mean lora_alpha?"),
        ("lora: {dropout: 3}", "did you mean lora_dropout?"),
        ("lora: {rank: 3}", "did you mean lora.r?"),
        ("lora: {bias: none}", FOREIGN_KEYS["bias"]),
        ("training: {bf16: true}", "write model.dtype: bfloat16"),
        ("training: {warmup_ratio: 0.1}", "write training.warmup_steps with a fraction below 1"),
        ("trust_remote_code: true", FOREIGN_KEYS["trust_remote_code"]),
        ("data_files: x", "did you mean dataset.path?"),
        ("zzz: 1", "keys here: task, method, model, dataset, lora, training, output_dir"),
    ],
)
def test_unknown_keys_and_the_way_out(line: str, help: str, tmp_path: Path):
    (mistake,) = mistakes(f"{START}{line}\n", tmp_path)
    inner = line.partition(":")[0] if "{" in line else ""
    assert mistake.message == (f"unknown key in {inner}" if inner and inner != "trainng" else "unknown key")
    assert mistake.help == help
    assert mistake.at_key


@pytest.mark.parametrize(
    ("line", "message", "help"),
    [
        (
            "task: causal",
            "must be causal_lm or sequence_classification, not the text 'causal'",
            "did you mean causal_lm?",
        ),
        ("method: LORA", "must be lora, full or head, not the text 'LORA'", "did you mean lora?"),
        ("method: 3", "must be lora, full or head, not 3", None),
        ("method: null", "must be lora, full or head, not empty", None),
        ("method: [lora]", "must be lora, full or head, not a list", "did you mean lora?"),
        ("lora: {r: 1e1}", "must be a whole number, not 10.0", None),
        ("lora: {r: '8'}", "must be a whole number, not the text '8'", None),
        ("lora: {r: true}", "must be a whole number, not true", None),
        ("lora: {r: no}", "must be a whole number, not the text 'no'", None),
        ("lora: {use_rslora: no}", "must be true or false, not the text 'no'", None),
        ("lora: {r: {a: 1}}", "must be a whole number, not a section", None),
        (f"lora: {{lora_alpha: {'9' * 400}}}", "must be a number, not a long number", None),
        (f"lora: {{r: {'x' * 99}}}", "must be a whole number, not a long text", None),
        ("lora: {layers_to_transform: 3}", "must be a list, not 3", None),
        ("lora: {rank_pattern: [1]}", "must be a mapping of keys to values, not a list", None),
        ("lora: []", "must be a section with keys, not a list", None),
        ("training:", "must be a section with keys, not empty", None),
    ],
)
def test_wrong_values(line: str, message: str, help: str | None, tmp_path: Path):
    (mistake,) = mistakes(f"{START}{line}\n", tmp_path)
    assert (mistake.message, mistake.help) == (message, help)


def test_a_list_as_model_names_the_path(tmp_path: Path):
    (mistake,) = mistakes("model: [a]\ndataset: d\noutput_dir: o\n", tmp_path)
    assert (mistake.name, mistake.message) == ("model.path", "must be a text, not a list")


def test_what_is_missing(tmp_path: Path):
    found = mistakes("lora: {}\n", tmp_path)
    assert [(m.name, m.message) for m in found] == [
        ("model", "is required"),
        ("dataset", "is required"),
        ("output_dir", "is required"),
    ]


def test_a_default_that_hangs_on_a_mistake_is_no_second_mistake(tmp_path: Path):
    """lora_alpha defaults to 2·r: with a wrong r there is one mistake, not two."""
    assert [m.name for m in mistakes(f"{START}lora: {{r: x}}\n", tmp_path)] == ["lora.r"]
    found = mistakes(f"{START}training: {{per_device_train_batch_size: x}}\n", tmp_path)
    assert [m.name for m in found] == ["training.per_device_train_batch_size"]


def test_a_wrong_item_of_a_list_is_told_by_the_lists_name(tmp_path: Path):
    (mistake,) = mistakes(f"{START}lora: {{layers_to_transform: [0, x]}}\n", tmp_path)
    assert mistake.path == ("lora", "layers_to_transform", 1)
    assert mistake.name == "lora.layers_to_transform"


def test_a_wrong_value_of_a_free_mapping(tmp_path: Path):
    (mistake,) = mistakes(f"{START}lora: {{rank_pattern: {{q_proj: 0}}}}\n", tmp_path)
    assert (mistake.name, mistake.message) == ("lora.rank_pattern.q_proj", "must be 1 or more")


def test_a_key_of_many_lists_is_told_once(tmp_path: Path):
    assert len(mistakes(f"{START}lora: {{lora_dropout: x, r: 0}}\n", tmp_path)) == 2


def test_section_keys():
    assert section_keys(()) == ["task", "method", "model", "dataset", "lora", "training", "output_dir"]
    assert section_keys(("lora",))[:2] == ["r", "lora_alpha"]
    assert section_keys(("lora", "rank_pattern")) == []
    assert section_keys(("nothing",)) == []


def test_no_foreign_key_is_one_of_ours():
    assert not set(FOREIGN_KEYS) & {*all_keys(), *(key.split(".")[-1] for key in all_keys())}


def test_a_key_that_another_section_has_may_mean_something_else_here(tmp_path: Path):
    """Not dataset.name, which is spelt alike."""
    (mistake,) = mistakes("model: {name: m}\ndataset: {path: d, name: n}\noutput_dir: o\n", tmp_path)[:1]
    assert (mistake.path, mistake.help) == (("model", "name"), "did you mean model.path?")
