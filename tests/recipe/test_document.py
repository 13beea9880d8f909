"""The schema in words and for editors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from lora_cli.recipe.document import json_schema, key_table
from lora_cli.recipe.messages import all_keys


def test_the_table_has_one_line_a_key_in_order():
    lines = key_table().splitlines()[2:]
    assert [re.match(r"\| `([^`]+)` \|", line)[1] for line in lines] == all_keys()
    assert all(line.count("|") == 4 for line in lines)


def test_every_key_has_a_meaning():
    for line in key_table().splitlines()[2:]:
        key, _, meaning = (cell.strip() for cell in line.strip("|").split("|"))
        assert len(meaning) > 5, key
        assert "None" not in line
        assert "Undefined" not in line


def test_defaults_in_the_table():
    table = key_table()
    for line in [
        "| `dataset.path` | **required** |",
        "| `lora.r` | `16` |",
        "| `lora.lora_alpha` | 2·r |",
        "| `dataset.too_long` | split for text, else truncate |",
        "| `training.learning_rate` | `0.0002` |",
        "| `training.use_cpu` | `false` |",
        "| `training.max_steps` | none |",
        "| `training.per_device_eval_batch_size` | as in training |",
    ]:
        assert line in table


def test_choices_are_spelt_out_once():
    table = key_table()
    assert "(`causal_lm`, `sequence_classification`)" in table
    line = next(line for line in table.splitlines() if line.startswith("| `training.lr_scheduler_type`"))
    assert [line.count(kind) for kind in ("cosine_with_min_lr", "wsd")] == [1, 1]


def test_the_json_schema_knows_every_key_and_no_other():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert sorted(schema["required"]) == ["dataset", "model", "output_dir"]

    def keys_of(section: dict, prefix: str) -> Iterator[str]:
        for name, value in section["properties"].items():
            yield prefix + name
            reference = next((part["$ref"] for part in [value, *value.get("anyOf", [])] if "$ref" in part), None)
            if reference:
                inner = schema["$defs"][reference.rsplit("/", 1)[-1]]
                assert inner["additionalProperties"] is False
                yield from keys_of(inner, f"{prefix}{name}.")

    assert list(keys_of(schema, "")) == all_keys()


def test_the_json_schema_takes_the_shorthands():
    schema = json_schema()["properties"]
    assert {"type": "string"} in schema["model"]["anyOf"]
    assert {"type": "string"} in schema["dataset"]["anyOf"]
    assert {"type": "array", "items": {"type": "string"}} in schema["dataset"]["anyOf"]


def test_the_command_prints_both(lora):
    assert lora("schema").json == json.loads(json.dumps(json_schema()))
    assert lora("schema", "--markdown").out.strip() == key_table()
