"""`lora combine` against PEFT's ``add_weighted_adapter``, and its refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch

from lora_cli.adapters.files import read_adapter
from lora_cli.seeds import stream
from tests.adapters.test_spectrum import dense
from tests.commands.test_inspect import edited
from tests.made import base_model, distance, loaded_by_peft, logits, other_weights, our_adapter, peft_adapter, task_of

SAME, DIFFERENT = 1e-5, 1e-2


def other_numbers(folder: Path, seed: int = 1) -> None:
    generator = stream(seed, "other")
    edited(folder, lambda ts: [t.copy_(0.2 * torch.randn(t.shape, generator=generator)) for t in ts.values()])


def two(base: Path, root: Path, task: str, first: dict, second: dict) -> tuple[Path, Path]:
    for name, config in (("a", first), ("b", second)):
        peft_adapter(base, root / name, task, **config)
    other_numbers(root / "b")
    return root / "a", root / "b"


def combined_by_peft(base: Path, folders, task: str, weights, method: str, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base_model(base, task), str(folders[0]))
        model.load_adapter(str(folders[1]), adapter_name="b")
        model.add_weighted_adapter(["default", "b"], weights, "both", combination_type=method, **options)
        model.set_adapter("both")
    return model.eval()


def combined(lora, folders, output: Path, method: str, weights, *options: object) -> dict:
    text = ",".join(map(str, weights))
    result = lora("combine", *folders, "--weights", text, "--method", method, "-o", output, "--json", *options)
    assert result.code == 0, result.err
    return result.json


def deltas(model) -> dict[str, torch.Tensor]:
    """The update of the active adapter, by module."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(module.active_adapters[0]).detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and module.active_adapters[0] in module.lora_A
    }


CASES = [
    ("linear", {}, ()),
    ("cat", {}, ()),
    ("ties", {"density": 0.3}, ("--density", 0.3)),
    ("svd", {}, ()),
    ("svd", {"svd_rank": 3}, ("--rank", 3)),
]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.5]])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "theirs", "ours"), CASES)
def test_the_result_is_peft_s(method, theirs, ours, kind, weights, tmp_path, model_folder, lora):
    base = model_folder(kind)
    fan = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    endings = {"alpha_pattern": {"q_proj" if kind == "llama" else "c_attn": 20}} | fan
    folders = two(base, tmp_path, task_of(kind), fan, {"lora_alpha": 3} | endings)
    expected = combined_by_peft(base, folders, task_of(kind), weights, method, **theirs)
    combined(lora, folders, tmp_path / "both", method, weights, *ours)
    found = loaded_by_peft(base, tmp_path / "both", task_of(kind))
    here, there = deltas(found), deltas(expected)
    assert here.keys() == there.keys()
    assert len(here) > 4
    assert max(distance(here[name], there[name]) for name in here) < SAME
    assert distance(logits(found), logits(expected)) < SAME
    assert distance(logits(found), logits(loaded_by_peft(base, folders[0], task_of(kind)))) > DIFFERENT


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_different_ranks_and_targets_are_peft_s_too(method, tmp_path, model_folder, lora):
    base = model_folder("llama")
    first = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    folders = two(base, tmp_path, "causal_lm", first, {"r": 6, "target_modules": ["v_proj", "up_proj"]})
    expected = deltas(combined_by_peft(base, folders, "causal_lm", [0.7, 0.3], method))
    report = combined(lora, folders, tmp_path / "both", method, [0.7, 0.3])
    found = deltas(loaded_by_peft(base, tmp_path / "both", "causal_lm"))
    assert found.keys() == expected.keys()
    assert max(distance(found[name], expected[name]) for name in found) < SAME
    assert report["modules"] == 6
    assert report["ranks"] == ([4, 6, 10] if method == "cat" else [4, 6])


def test_the_distance_from_the_sum_is_that_of_the_dense_updates(tmp_path, model_folder, lora):
    folders = two(model_folder("llama"), tmp_path, "causal_lm", {}, {})
    one, other = (read_adapter(folder).updates for folder in folders)
    for method in ("cat", "linear", "dare_ties"):
        report = combined(lora, folders, tmp_path / method, method, [0.7, 0.3])
        made = read_adapter(tmp_path / method).updates
        sums = {name: 0.7 * dense(one[name]) + 0.3 * dense(other[name]) for name in made}
        off = torch.stack([(dense(made[name]) - total).norm() for name, total in sums.items()]).norm()
        norm = torch.stack([total.norm() for total in sums.values()]).norm()
        assert report["distance_from_sum"] == pytest.approx(float(off / norm), rel=1e-6, abs=1e-9)
        assert report["distance_from_sum"] < 1e-6 if method == "cat" else report["distance_from_sum"] > 0.1


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_repeats_with_its_seed(method, tmp_path, model_folder, lora):
    folders = two(model_folder("llama"), tmp_path, "causal_lm", {}, {})
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        combined(lora, folders, tmp_path / name, method, [0.7, 0.3], "--seed", seed)
    one, again, two_ = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "again", "two"))
    assert one == again
    assert one != two_


def test_stabilised_adapters_are_added_at_their_own_scale(tmp_path, model_folder, lora):
    """PEFT 0.21 keeps use_rslora for the result, whose scale is then the root of its rank; here it is 1."""
    folders = two(model_folder("llama"), tmp_path, "causal_lm", {"use_rslora": True}, {"use_rslora": True})
    combined(lora, folders, tmp_path / "both", "cat", [0.7, 0.3])
    one, other, both = (read_adapter(folder).updates for folder in (*folders, tmp_path / "both"))
    for name, update in both.items():
        assert float((dense(update) - 0.7 * dense(one[name]) - 0.3 * dense(other[name])).abs().max()) < SAME
    assert "use_rslora" not in json.loads((tmp_path / "both" / "adapter_config.json").read_text())


@pytest.fixture
def refused(tmp_path, lora):
    """``refused(b, *options)``: combining ``tmp_path/a`` with it fails, and nothing is left."""

    def run(second: Path, *options: object, weights: str = "0.7,0.3") -> str:
        result = lora("combine", tmp_path / "a", second, "--weights", weights, "-o", tmp_path / "both", *options)
        assert result.code == 2, result.err
        assert not (tmp_path / "both").exists()
        return result.err

    return run


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties"])
def test_methods_on_factors_need_equal_modules_and_ranks(method, tmp_path, model_folder, refused):
    base = model_folder("llama")
    for name, keys in (("a", {}), ("rank", {"r": 6}), ("few", {"target_modules": ["q_proj"]})):
        our_adapter(base, tmp_path / name, "causal_lm", **keys)
    assert f"{method} needs equal ranks" in refused(tmp_path / "rank", "--method", method)
    assert f"{method} needs the same" in refused(tmp_path / "few", "--method", method)


def test_what_does_not_go_together_is_refused_by_name(tmp_path, model_folder, refused):
    base = model_folder("llama")
    our_adapter(base, tmp_path / "a", "causal_lm")
    other = other_weights(base, tmp_path / "other-base", "causal_lm")
    our_adapter(other, tmp_path / "elsewhere", "causal_lm")
    assert "belong to different bases" in refused(tmp_path / "elsewhere")
    peft_adapter(model_folder("llama", hidden_size=16), tmp_path / "unlike", "causal_lm")
    assert "belong to different bases" in refused(tmp_path / "unlike")
    our_adapter(base, tmp_path / "dora", "causal_lm", use_dora=True)
    assert "is a DoRA adapter" in refused(tmp_path / "dora")
    our_adapter(base, tmp_path / "saved", "causal_lm", modules_to_save=["norm"])
    assert "holds modules trained in full (model.norm)" in refused(tmp_path / "saved")
    peft_adapter(base, tmp_path / "wide", "causal_lm")
    edited(tmp_path / "wide", lambda ts: ts.update({n: t.repeat(1, 2) for n, t in ts.items() if "lora_A" in n}))
    assert "in one adapter and" in refused(tmp_path / "wide")


def test_a_moved_base_is_known_by_its_fingerprint(tmp_path, model_folder, lora):
    base = model_folder("llama")
    for name in ("a", "b"):
        our_adapter(base, tmp_path / name, "causal_lm")
    path = tmp_path / "b" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "moved"}))
    combined(lora, (tmp_path / "a", tmp_path / "b"), tmp_path / "both", "cat", [0.5, 0.5])
    assert (tmp_path / "both" / "provenance.json").is_file()


@pytest.mark.parametrize(
    ("options", "weights", "message"),
    [
        ((), "1", "2 adapters need 2 weights, not 1"),
        ((), "1,x", "is no list of numbers"),
        ((), "1,nan", "must be finite"),
        (("--method", "slerp"), "1,1", "--method slerp is not known"),
        (("--method", "ties", "--density", 0), "1,1", "--density 0.0 is no share"),
        (("--method", "cat", "--rank", 3), "1,1", "is for svd"),
        (("--method", "svd", "--rank", 0), "1,1", "is for svd"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(options, weights, message, tmp_path, refused):
    assert message in refused(tmp_path / "b", *options, weights=weights)


def test_one_adapter_and_an_existing_folder_are_refused(tmp_path, model_folder, lora):
    our_adapter(model_folder("llama"), tmp_path / "a", "causal_lm")
    assert "name two or more" in lora("combine", tmp_path / "a", "--weights", "1", "-o", tmp_path / "x").err
    result = lora("combine", tmp_path / "a", tmp_path / "a", "--weights", "1,1", "-o", tmp_path / "a")
    assert "exists already" in result.err


def test_the_screen_says_what_was_combined(tmp_path, model_folder, lora):
    folders = two(model_folder("llama"), tmp_path, "causal_lm", {}, {})
    screen = lora("combine", *folders, "--weights", "0.7,0.3", "--method", "dare_linear", "-o", tmp_path / "both").out
    assert f"0.7 x {folders[0]}" in screen
    assert "dare_linear, density 0.5, seed 42" in screen
    assert "from the weighted sum" in screen
