"""`modules_to_save` with an embedding and an output head that are one table: trained once, and one table again."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.adapters.injection import freeze_base
from lora_cli.adapters.targets import find_saved
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_network
from tests.conftest import tiny_model
from tests.fusion.test_networks import loss_and_gradients, reference, rows_of, worst
from tests.made import base_model, distance, loaded_by_peft, loaded_by_us, logits

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_its_gradient_is_that_of_both_uses(dtype, limit):
    """Against the model's own code in float64; the control: of one use alone it is another."""
    model = tiny_model("llama", vocab_size=120).to(dtype)
    plain = copy.deepcopy(model).requires_grad_(False).double()
    plain.lm_head.weight.requires_grad_(True)
    freeze_base(model, find_saved(model, ["embed_tokens"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    rows = rows_of("causal_lm")
    exact = reference(plain, "causal_lm", rows)
    untied = copy.deepcopy(plain)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone(), requires_grad=False)
    apart = loss_and_gradients(Network(untied), "causal_lm", rows)
    network = build_network(model, "causal_lm")
    assert network.head is not None
    assert worst(loss_and_gradients(network, "causal_lm", rows), exact) < limit
    assert distance(apart[EMBEDDING], exact[EMBEDDING]) > 0.1 * float(exact[EMBEDDING].abs().max())


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_trains_it_and_everything_reads_it(module, dtype, recipe, lora, tmp_path, model_folder):
    """Train, resume to the same bytes, PEFT, merge, go on."""
    base, adapter = model_folder("llama"), tmp_path / "run" / "adapter"
    model = {"path": str(base), "dtype": dtype}
    path = recipe(
        model=model,
        lora={"r": 4, "modules_to_save": [module]},
        **{"training.save_steps": 2, "training.save_dtype": "float32"},
    )
    result = lora("train", path, "--json")
    assert result.code == 0, result.err
    tensors = load_file(adapter / "adapter_model.safetensors")
    one, other = (tensors[f"base_model.model.{name}"] for name in (EMBEDDING, HEAD))
    assert torch.equal(one, other)
    assert distance(one, load_file(base / "model.safetensors")[EMBEDDING].float()) > 1e-3
    expected = logits(loaded_by_us(adapter))
    assert distance(logits(loaded_by_peft(base, adapter, "causal_lm")), expected) < 1e-5
    merged = lora("merge", adapter, "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), expected) < 1e-5
    first = (adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    shutil.rmtree(adapter)
    again = lora("train", path, "--json")
    assert again.code == 0, again.err
    assert (adapter / "adapter_model.safetensors").read_bytes() == first
    second = recipe(
        "second.yaml", model=model, lora={"init_from": str(adapter)}, output_dir=str(tmp_path / "second"),
        **{"training.learning_rate": 1e-9, "training.save_dtype": "float32"},
    )  # fmt: skip
    going_on = lora("train", second, "--json")
    assert going_on.code == 0, going_on.err
    assert distance(logits(loaded_by_us(tmp_path / "second" / "adapter")), expected) < 1e-5


def test_it_is_counted_once(recipe, lora):
    path = recipe()
    plain, more = (
        lora("count-params", path, *extra, "--json").json for extra in ([], ["lora.modules_to_save=lm_head"])
    )
    assert more["learnable"] - plain["learnable"] == 320 * 32
    assert more["total"] == plain["total"]


def test_as_the_only_thing_that_is_trained(recipe, lora, tmp_path):
    """`method: head` writes a plain model folder, and resumes."""
    path = recipe(lora={"modules_to_save": ["lm_head"]}, method="head", **{"training.save_steps": 2})
    assert lora("train", path, "--json").code == 0
    first = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert HEAD not in first
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "run" / "model")
    again = lora("train", path, "--json")
    assert again.code == 0, again.err
    assert torch.equal(load_file(tmp_path / "run" / "model" / "model.safetensors")[EMBEDDING], first[EMBEDDING])
