"""`lora count-params` against published totals and numbers counted by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.conftest import labelled_rows, tiny_model, write_jsonl
from tests.made import our_adapter, peft_adapter

ROBERTA_BASE = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "num_labels": 2,
}
THREE = ["attention.self.query", "attention.output.dense", "output.dense"]
SIX = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
PUBLISHED = "Total parameters: 124,978,946, thereof learnable: 923,906 (0.7392%)"


@pytest.fixture
def written(tmp_path):
    """``written(model, task, lora, ...)``: a recipe whose rows and tokenizer are not there, and not needed."""

    def write(model: object, task: str = "causal_lm", lora: dict | None = None, **changes: object) -> Path:
        values = {"task": task, "model": model, "dataset": "nowhere.jsonl", "output_dir": "run"} | changes
        if lora is not None:
            values["lora"] = lora
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def roberta(written):
    def write(**lora: object) -> Path:
        model = {"config": ROBERTA_BASE, "tokenizer": "nowhere"}
        return written(model, "sequence_classification", lora)

    return write


def table_of(result) -> dict[str, tuple[int, bool]]:
    return {tensor["name"]: (tensor["numel"], tensor["learnable"]) for tensor in result.json["tensors"]}


# the published table


def test_the_published_table_rank_4_on_three_linears(roberta, lora):
    path = roberta(r=4, target_modules=THREE)
    shown = lora("count-params", path)
    assert shown.code == 0, shown.err
    assert shown.out.splitlines()[-1] == PUBLISHED
    result = lora("count-params", path, "--json")
    assert (result.json["total"], result.json["learnable"], result.json["percent"]) == (124_978_946, 923_906, 0.7392)
    table = table_of(result)
    for layer in range(12):
        prefix = f"roberta.encoder.layer.{layer}."
        assert table[f"{prefix}output.dense.lora_A"] == (12_288, True)
        assert table[f"{prefix}output.dense.lora_B"] == (3_072, True)
        assert table[f"{prefix}attention.self.query.lora_A"] == (3_072, True)
        assert table[f"{prefix}attention.output.dense.lora_B"] == (3_072, True)
        assert table[f"{prefix}output.dense.weight"] == (2_359_296, False)
    trained = Counter(name.rpartition(".")[2] for name, (_, learnable) in table.items() if learnable)
    assert trained == {"lora_A": 36, "lora_B": 36, "weight": 2, "bias": 2}
    assert sum(numel for numel, learnable in table.values() if learnable) == 923_906


def test_rank_2_on_all_six_linears_has_the_same_totals_and_other_rows(roberta, lora):
    result = lora("count-params", roberta(r=2, target_modules=SIX), "--json")
    other = lora("count-params", roberta(r=4, target_modules=THREE), "--json")
    assert (result.json["total"], result.json["learnable"]) == (124_978_946, 923_906)
    assert result.json["percent"] == 0.7392
    table = table_of(result)
    prefix = "roberta.encoder.layer.11."
    assert table[f"{prefix}output.dense.lora_A"] == (6_144, True)
    assert table[f"{prefix}intermediate.dense.lora_B"] == (6_144, True)
    assert table[f"{prefix}attention.self.key.lora_A"] == (1_536, True)
    assert len(table) == len(table_of(other)) + 2 * 12 * 3
    assert table != table_of(other)


def test_the_table_on_the_screen_has_one_row_a_kind_of_module(roberta, lora):
    lines = lora("count-params", roberta(r=4, target_modules=THREE)).out.splitlines()
    [row] = [line for line in lines if line.startswith("roberta.encoder.layer.{0..11}.output.dense ")]
    figures = ["12 x", "A 4 x 3072*, B 768 x 4*, weight 768 x 3072, bias 768", f"{12 * 2_375_424:,}", "184,320"]
    assert re.split(r"  +", row.strip())[1:] == figures
    assert lines[-2:] == ["* trained", PUBLISHED]
    assert max(map(len, lines)) <= 160  # the width of a pipe: no row is broken


def test_all_lists_every_tensor_as_name_flag_and_elements(roberta, lora):
    path = roberta(r=4, target_modules=THREE)
    lines = lora("count-params", path, "--all").out.splitlines()
    assert lines[-1] == PUBLISHED
    assert "roberta.encoder.layer.7.output.dense.lora_A 1 12288" in lines
    assert "roberta.encoder.layer.7.output.dense.lora_B 1 3072" in lines
    assert "roberta.embeddings.word_embeddings.weight 0 38603520" in lines
    assert "classifier.out_proj.bias 1 2" in lines
    parsed = [line.rsplit(" ", 2) for line in lines[:-1]]
    assert sum(int(numel) for _, _, numel in parsed) == 124_978_946
    assert sum(int(numel) for _, flag, numel in parsed if flag == "1") == 923_906
    assert {flag for _, flag, _ in parsed} == {"0", "1"}
    expected = lora("count-params", path, "--json").json["tensors"]
    assert [name for name, _, _ in parsed] == [tensor["name"] for tensor in expected]


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("smollm2-135m", 134_515_008),
        ("qwen2.5-0.5b", 494_032_768),
        ("llama-3-8b-instruct", 8_030_261_248),
        ("gpt2", 124_439_808),
    ],
)
def test_published_totals_of_real_configurations(name, total, shared, lora):
    shown = lora("count-params", shared / "configs" / name)
    assert shown.out.splitlines()[-1] == f"Total parameters: {total:,}, thereof learnable: {total:,} (100.0000%)"


def test_roberta_base_with_a_2_label_head(shared, written, lora):
    model = {"path": str(shared / "configs" / "roberta-base"), "tokenizer": "nowhere"}
    result = lora("count-params", written(model, "sequence_classification", method="head"), "--json")
    assert (result.json["total"], result.json["learnable"]) == (124_647_170, 592_130)


def test_llama_3_8b_with_all_seven_projections_at_rank_16(shared, written, lora):
    path = written({"path": str(shared / "configs" / "llama-3-8b-instruct")}, lora={"r": 16})
    result = lora("count-params", path, "--json")
    assert result.json["learnable"] == 41_943_040
    assert result.json["total"] == 8_030_261_248 + 41_943_040
    assert result.json["percent"] == 0.5196


# the document


def test_the_json_document_has_exactly_this_shape(written, model_folder, lora):
    result = lora("count-params", written(str(model_folder("llama")), lora={"r": 4}), "--json")
    assert result.err == ""
    assert list(result.json) == ["total", "learnable", "percent", "tensors"]
    assert {tuple(tensor) for tensor in result.json["tensors"]} == {("name", "shape", "numel", "learnable")}
    by_name = {tensor["name"]: tensor for tensor in result.json["tensors"]}
    assert by_name["model.layers.0.self_attn.q_proj.weight"] == {
        "name": "model.layers.0.self_attn.q_proj.weight", "shape": [32, 32], "numel": 1024, "learnable": False,
    }  # fmt: skip
    assert by_name["model.layers.0.self_attn.q_proj.lora_A"]["shape"] == [4, 32]
    assert not any(".base." in name for name in by_name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_shared_weight_counts_once(tied, model_folder, written, lora):
    folder = model_folder("llama", tie_word_embeddings=tied)
    result = lora("count-params", written(str(folder), lora={"r": 4}), "--json").json
    assert sum(tensor["numel"] for tensor in result["tensors"]) == result["total"]
    assert sum(tensor["numel"] for tensor in result["tensors"] if tensor["learnable"]) == result["learnable"]
    names = [tensor["name"] for tensor in result["tensors"]]
    assert len(names) == len(set(names))
    assert ("lm_head.weight" in names) is not tied
    base = sum(p.numel() for p in tiny_model("llama", tie_word_embeddings=tied).parameters())
    assert result["total"] - result["learnable"] == base


# what can be counted


def test_a_model_as_it_is(model_folder, lora):
    """The class that its configuration names, with its head."""
    result = lora("count-params", model_folder("bert", "sequence_classification"), "--json").json
    expected = tiny_model("bert", "sequence_classification")
    assert {t["name"]: t["shape"] for t in result["tensors"]} == {
        n: list(p.shape) for n, p in expected.named_parameters()
    }
    assert result["percent"] == 100.0


def test_no_weight_is_read(tmp_path, model_folder, written, lora):
    """A folder with just config.json is enough; so is one whose weights are damaged."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((model_folder("llama") / "config.json").read_bytes())
    expected = lora("count-params", model_folder("llama"), "--json").json
    assert lora("count-params", folder, "--json").json == expected
    (folder / "model.safetensors").write_text("damaged")
    assert lora("count-params", folder, "--json").json == expected
    assert lora("count-params", written(str(folder)), "--json").code == 0


@pytest.mark.parametrize("maker", [our_adapter, peft_adapter])
def test_an_adapter_on_its_base(maker, tmp_path, model_folder, written, lora):
    keys = {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}}
    maker(model_folder("llama"), tmp_path / "adapter", "causal_lm", **keys)
    result = lora("count-params", tmp_path / "adapter", "--json")
    assert result.code == 0, result.err
    recipe = written(str(model_folder("llama")), lora={"r": 4, **keys})
    assert result.json == lora("count-params", recipe, "--json").json
    assert result.json["learnable"] == 2 * (2 * (32 + 32) + 4 * (32 + 48))


def test_an_adapter_with_its_head(tmp_path, model_folder, lora):
    our_adapter(
        model_folder("bert", "causal_lm"), tmp_path / "adapter", "sequence_classification", target_modules=["key"]
    )
    result = lora("count-params", tmp_path / "adapter", "--json").json
    assert {t["name"] for t in result["tensors"] if t["learnable"] and "lora" not in t["name"]} == {
        "classifier.weight", "classifier.bias",
    }  # fmt: skip
    assert result["learnable"] == 2 * 4 * (32 + 32) + 2 * 32 + 2


def test_an_adapters_base_may_be_named(tmp_path, model_folder, lora):
    our_adapter(model_folder("llama"), tmp_path / "adapter", "causal_lm")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    assert "does not say which base it belongs to" in lora("count-params", tmp_path / "adapter").err
    assert lora("count-params", tmp_path / "adapter", "--base", model_folder("llama")).code == 0


@pytest.mark.parametrize(
    ("arguments", "learnable"),
    [
        ([], 2 * 4 * (32 + 32)),
        (["lora.r=8"], 2 * 8 * (32 + 32)),
        (["lora.target_modules=[q_proj, down_proj]"], 2 * 4 * (32 + 32 + 48 + 32)),
        (["lora.modules_to_save=norm"], 2 * 4 * (32 + 32) + 32),
        (["model.dtype=bfloat16"], 2 * 4 * (32 + 32)),
    ],
)
def test_overrides_change_the_count(arguments, learnable, model_folder, written, lora):
    path = written(str(model_folder("llama")), lora={"r": 4, "target_modules": ["q_proj"]})
    assert lora("count-params", path, *arguments, "--json").json["learnable"] == learnable


@pytest.mark.parametrize(("method", "share"), [("full", 1.0), ("head", None)])
def test_the_baselines_count_too(method, share, model_folder, written, lora):
    path = written(str(model_folder("bert", "sequence_classification")), "sequence_classification", method=method)
    result = lora("count-params", path, "--json").json
    assert result["learnable"] == (result["total"] if share else 2 * 32 + 2)


def test_a_new_head_is_as_wide_as_the_rows_have_labels(tmp_path, model_folder, written, lora):
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [row | {"label": f"l{i % 5}"} for i, row in enumerate(labelled_rows(10))]
    )
    path = written(str(model_folder("bert", "causal_lm")), "sequence_classification", dataset=str(rows))
    shapes = {t["name"]: t["shape"] for t in lora("count-params", path, "--json").json["tensors"]}
    assert shapes["classifier.weight"] == [5, 32]
    path = written(str(model_folder("bert", "causal_lm")), "sequence_classification")  # no rows at hand
    shapes = {t["name"]: t["shape"] for t in lora("count-params", path, "--json").json["tensors"]}
    assert shapes["classifier.weight"] == [2, 32]


def test_a_run_counts_what_it_will_train(recipe, lora):
    path = recipe(**{"training.max_steps": 1})
    counted = lora("count-params", path, "--json").json
    trained = lora("train", path, "--json").json["parameters"]
    assert (trained["total"], trained["trainable"]) == (counted["total"], counted["learnable"])


# errors


def refusal(result) -> str:
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    return result.err


def test_a_target_that_matches_nothing_is_shown_at_its_place(model_folder, written, lora):
    path = written(str(model_folder("llama")), lora={"target_modules": ["q_prj"]})
    told = refusal(lora("count-params", path))
    assert "no layer is named 'q_prj'" in told
    assert "did you mean q_proj?" in told
    assert f"--> {path}:" in told


def test_overrides_belong_to_a_recipe(model_folder, lora):
    assert "KEY=VALUE belongs to a recipe" in refusal(lora("count-params", model_folder("llama"), "lora.r=8"))


def test_base_belongs_to_an_adapter(model_folder, written, lora):
    for what in (written(str(model_folder("llama"))), model_folder("llama")):
        told = refusal(lora("count-params", what, "--base", model_folder("gpt2")))
        assert f"--base belongs to an adapter, and {what} is none" in told


def test_a_folder_that_holds_nothing_is_refused(tmp_path, lora):
    assert "holds no config.json" in refusal(lora("count-params", tmp_path))


def test_a_recipe_that_is_not_there_is_refused(tmp_path, lora):
    assert f"there is no recipe {tmp_path / 'no.yaml'}" in refusal(lora("count-params", tmp_path / "no.yaml"))


def test_a_configuration_that_builds_no_model_is_refused(tmp_path, model_folder, lora):
    config = json.loads((model_folder("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": -32}))
    told = refusal(lora("count-params", tmp_path))
    assert "no llama model can be built from its configuration" in told


def test_a_model_that_is_no_language_model_is_still_counted(tmp_path, lora):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    )
    assert lora("count-params", tmp_path, "--json").json["total"] == 60_506_624  # t5-small


def test_errors_as_json_are_one_document_too(tmp_path, lora):
    result = lora("count-params", tmp_path, "--json")
    assert result.json["error"]["exit_code"] == result.code == 2
