"""Folding into weight files: names, shards, types, and the arithmetic to the last bit."""

from __future__ import annotations

import json
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_cli.adapters import merging
from lora_cli.adapters.adapter import Adapter, LowRank
from lora_cli.adapters.merging import Naming, merge_files
from lora_cli.errors import StorageError, UsageError
from lora_cli.seeds import stream

# naming

BERT = {"bert.encoder.layer.0.output.LayerNorm.weight", "bert.encoder.layer.0.output.LayerNorm.bias",
        "bert.pooler.dense.weight", "classifier.weight"}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "parameter"),
    [
        ("bert.pooler.dense.weight", "bert.pooler.dense.weight"),
        ("pooler.dense.weight", "bert.pooler.dense.weight"),  # saved from the bare base
        ("bert.encoder.layer.0.output.LayerNorm.gamma", "bert.encoder.layer.0.output.LayerNorm.weight"),
        ("encoder.layer.0.output.LayerNorm.beta", "bert.encoder.layer.0.output.LayerNorm.bias"),
        ("classifier.weight", "classifier.weight"),
        ("bert.classifier.weight", "classifier.weight"),
        ("cls.predictions.bias", None),
        ("encoder.layer.0.gamma", None),  # a layer scale is no LayerNorm
    ],
)
def test_a_key_of_the_file_is_found_among_the_parameters(key, parameter):
    assert Naming(BERT, "bert", keep_foreign=False).parameter(key) == parameter


def test_what_belongs_to_another_head_is_left_out_of_a_classifier_and_kept_in_a_language_model():
    for keep, expected in [(True, "cls.predictions.bias"), (False, None)]:
        assert Naming(BERT, "bert", keep_foreign=keep).written("cls.predictions.bias") == expected
        assert Naming(BERT, "bert", keep_foreign=keep).written("bert.extra") == "bert.extra"
        assert Naming(BERT, "bert", keep_foreign=keep).written("pooler.dense.weight") == "bert.pooler.dense.weight"


# files


def random(*shape: int, dtype: torch.dtype = torch.float32, name: str = "") -> Tensor:
    return torch.randn(shape, generator=stream(0, name, *shape)).to(dtype)


def update(out_features: int, in_features: int, scaling: float = 0.5, r: int = 3) -> LowRank:
    return LowRank(random(r, in_features, name="A"), random(out_features, r, name="B"), scaling)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "m.a.weight": random(6, 8, dtype=dtype, name="a"),
        "m.a.bias": random(6, dtype=dtype, name="bias"),
        "m.c.weight": random(8, 6, dtype=dtype, name="c"),
        "m.ids": torch.arange(5),
        "m.norm.weight": random(8, dtype=dtype, name="n"),
    }


@pytest.fixture
def merged(tmp_path):
    """``merged(adapter, *shards, dtype=None)``: the merged tensors, read back with the library."""

    def run(adapter: Adapter, *shards: dict[str, Tensor], dtype=None, keep_foreign: bool = True) -> dict[str, Tensor]:
        base, out = tmp_path / "base", tmp_path / "out"
        base.mkdir()
        out.mkdir()
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            table = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, base / name)
        parameters = {key for shard in shards for key in shard} | set(adapter.saved)
        merge_files(base, out, adapter, Naming(parameters, "m", keep_foreign), {"m.c"}, dtype)
        return {key: t for path in sorted(out.glob("*.safetensors")) for key, t in load_file(path).items()}

    return run


def test_w_plus_s_b_a_for_both_ways_of_storing_and_nothing_else_changes(merged):
    base, a, c = tensors(), update(6, 8), update(6, 8, scaling=2.0)
    found = merged(Adapter({}, {"m.a": a, "m.c": c}), base)
    assert found.keys() == base.keys()
    assert torch.equal(found["m.a.weight"], base["m.a.weight"] + 0.5 * (a.lora_B @ a.lora_A))
    assert torch.equal(found["m.c.weight"], base["m.c.weight"] + (2.0 * (c.lora_B @ c.lora_A)).T)
    for name in ("m.a.bias", "m.ids", "m.norm.weight"):
        assert torch.equal(found[name], base[name])
    assert (found["m.a.weight"] - base["m.a.weight"]).abs().max() > 0.1


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_sum_is_made_in_float32_and_rounded_once(merged, stored):
    base, a = tensors(stored), update(6, 8, scaling=0.3)
    found = merged(Adapter({}, {"m.a": a}), base)["m.a.weight"]
    delta = 0.3 * (a.lora_B @ a.lora_A)
    assert torch.equal(found, (base["m.a.weight"].float() + delta).to(stored))
    twice = base["m.a.weight"] + delta.to(stored)  # the control: rounding the update first gives other bits
    assert not torch.equal(found, twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_casts_what_is_floating_and_leaves_integers(merged, dtype):
    base, a = tensors(torch.bfloat16), update(6, 8)
    found = merged(Adapter({}, {"m.a": a}, {"m.norm.weight": random(8, name="trained")}), base, dtype=dtype)
    assert {name: t.dtype for name, t in found.items()} == {
        name: dtype if t.is_floating_point() else t.dtype for name, t in base.items()
    }
    assert torch.equal(found["m.a.weight"], (base["m.a.weight"].float() + 0.5 * a.lora_B @ a.lora_A).to(dtype))
    assert torch.equal(found["m.norm.weight"], random(8, name="trained").to(dtype))


def test_a_module_trained_in_full_replaces_the_bases(merged):
    head = random(8, name="trained")
    found = merged(Adapter({}, {}, {"m.norm.weight": head}), tensors())
    assert torch.equal(found["m.norm.weight"], head)


def test_shards_stay_as_they_were_cut(merged, tmp_path):
    base = tensors()
    shards = [{"m.a.weight": base["m.a.weight"], "m.ids": base["m.ids"]}, {"m.c.weight": base["m.c.weight"]}]
    merged(Adapter({}, {"m.a": update(6, 8)}), *shards)
    files = {path.name: sorted(load_file(path)) for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == {
        "model-00001-of-00002.safetensors": ["m.a.weight", "m.ids"],
        "model-00002-of-00002.safetensors": ["m.c.weight"],
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 6 * 8 * 4 + 5 * 8 + 8 * 6 * 4},
        "weight_map": {
            "m.a.weight": "model-00001-of-00002.safetensors",
            "m.c.weight": "model-00002-of-00002.safetensors",
            "m.ids": "model-00001-of-00002.safetensors",
        },
    }


def test_a_head_that_the_base_lacks_is_added_to_the_last_shard(merged, tmp_path):
    base, head = tensors(), random(2, 8, name="head")
    shards = [{"m.a.weight": base["m.a.weight"]}, {"m.c.weight": base["m.c.weight"]}]
    merged(Adapter({}, {"m.a": update(6, 8)}, {"score.weight": head}), *shards, dtype=torch.bfloat16)
    last = load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    assert torch.equal(last["score.weight"], head.bfloat16())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"


def test_an_adapted_layer_whose_weight_the_files_lack_is_refused(merged):
    with pytest.raises(UsageError, match=r"the base's files hold no weight for m.x$"):
        merged(Adapter({}, {"m.a": update(6, 8), "m.x": update(6, 8)}), tensors())


def test_only_one_tensor_is_held_at_a_time(merged, monkeypatch):
    """Of the base's, of the update's and of the merged ones: before the next is made, the last one is gone."""
    made: list[weakref.ref] = []
    write, fold = merging.write_tensors, merging.fold

    def watched(produce):
        def checked(entry):
            assert not [reference for reference in made if reference() is not None], entry.name
            tensor = produce(entry)
            made.append(weakref.ref(tensor))
            return tensor

        return checked

    def folded(weight, *rest):
        made.append(weakref.ref(weight))
        result = fold(weight, *rest)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(merging, "write_tensors", lambda path, entries, produce: write(path, entries, watched(produce)))
    monkeypatch.setattr(merging, "fold", folded)
    merged(Adapter({}, {"m.a": update(6, 8), "m.c": update(6, 8)}), tensors(), dtype=torch.bfloat16)
    assert len(made) == len(tensors()) + 2 * 2


def write_raw(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_a_type_that_cannot_be_merged_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, {"m.a.weight": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4)
    with pytest.raises(UsageError, match=r"m.a.weight is stored as F8_E8M0, which cannot be merged"):
        merge_files(tmp_path, tmp_path, Adapter({}), Naming({"m.a.weight"}, "m", True), set(), None)


def test_a_damaged_base_is_told_as_such_not_as_a_failure_to_write(tmp_path):
    """Our table and the library disagree about what a damaged file is; both answers name the base."""
    path, out = tmp_path / "model.safetensors", tmp_path / "out"
    out.mkdir()
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}  # a gap before the first tensor
    write_raw(path, header, b"\0" * 8)
    with pytest.raises(StorageError, match=r"model.safetensors is not a readable safetensors file"):
        merge_files(tmp_path, out, Adapter({}), Naming({"x"}, "m", True), set(), None)
