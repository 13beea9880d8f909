"""Updates of stacked experts: against dense arithmetic, and PEFT both ways."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_cli.adapters.experts import LoRAExperts, is_plain, stacked_update
from lora_cli.adapters.files import read_adapter
from lora_cli.adapters.injection import adapters_of, attach, freeze_base
from lora_cli.adapters.targets import find_saved, find_targets
from lora_cli.errors import RecipeError
from lora_cli.recipe import LoraSection
from tests.made import IDS, base_model, distance, loaded_by_peft, loaded_by_us, logits, our_adapter, perturb

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path, tokenizer):
    """A saved tiny mixture of the kind that a test is given."""
    kind = request.param
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | KINDS[kind])))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


every_kind = pytest.mark.parametrize("base", list(KINDS), indirect=True)


@every_kind
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]])
def test_peft_reads_ours_and_gives_the_same_logits(base, parameters, tmp_path):
    model = our_adapter(
        base, tmp_path / "adapter", "causal_lm", target_modules=["q_proj"], target_parameters=parameters
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        theirs = loaded_by_peft(base, tmp_path / "adapter", "causal_lm")
    assert distance(logits(theirs), logits(model)) < 1e-5
    assert distance(logits(loaded_by_us(tmp_path / "adapter")), logits(model)) < 1e-6
    assert distance(logits(model), logits(base_model(base, "causal_lm"))) > 1e-2


@every_kind
@pytest.mark.parametrize("parameters", [BOTH, BOTH[1:]])
def test_we_read_peft_s_and_give_the_same_logits(base, parameters, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=parameters, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base_model(base, "causal_lm"), config)
    perturb(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert distance(logits(loaded_by_us(tmp_path / "adapter")), logits(model)) < 1e-5


@every_kind
def test_gradients_are_those_of_the_whole_matrix(base):
    """Expert by expert, or with all experts' matrices formed: what each factor gets is the same."""
    found = []
    for whole in (False, True):
        model = base_model(base, "causal_lm")
        lora = LoraSection(r=4, target_modules=["q_proj"], target_parameters=BOTH)
        attach(model, find_targets(model, lora, []))
        freeze_base(model, [])
        perturb(model)
        if whole:
            for module in model.modules():
                if isinstance(module, LoRAExperts):
                    module.base._apply_gate_is_its_own = True
                    module.base.has_gate = "told otherwise"
                    assert not is_plain(module.base)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() < 1e-4 * found[1][name].norm() + 1e-9, name
    assert all(float(gradient.norm()) > 0 for gradient in found[0].values())


def test_an_update_is_one_product_an_expert():
    a, b = torch.randn(3 * 4, 5), torch.randn(7, 4 * 3)
    found = stacked_update(a, b, 0.5, 3, transposed=False)
    for expert in range(3):
        a_RI, b_OR = a[expert * 4 : expert * 4 + 4], b[:, [rank * 3 + expert for rank in range(4)]]
        assert torch.allclose(found[expert], 0.5 * b_OR @ a_RI, atol=1e-6)
    assert torch.equal(stacked_update(a, b, 0.5, 3, transposed=True), found.transpose(1, 2))


@every_kind
@pytest.mark.parametrize(
    "trained",
    [
        {"target_parameters": BOTH},
        {"target_parameters": BOTH, "layers_to_transform": [1]},
        {"modules_to_save": ["experts"]},
    ],
    ids=["adapted", "upper layer", "saved"],
)
def test_trained_resumed_and_merged_through_the_command_line(base, trained, recipe, tmp_path, lora):
    changes = {
        "model": {"path": str(base), "dtype": "float32"},
        "lora": {"r": 4, "target_modules": ["q_proj"]} | trained,
    }
    result = lora("train", recipe(**changes), "--json")
    assert result.code == 0, result.err
    adapted = logits(loaded_by_us(tmp_path / "run" / "adapter"))
    merged = lora("merge", tmp_path / "run" / "adapter", "-o", tmp_path / "merged", "--json")
    assert merged.code == 0, merged.err
    assert distance(logits(base_model(tmp_path / "merged", "causal_lm")), adapted) < 1e-4
    assert distance(adapted, logits(base_model(base, "causal_lm"))) > 1e-3
    counted = lora("count-params", tmp_path / "run" / "adapter", "--json").json
    assert counted["learnable"] == result.json["parameters"]["trainable"]


@pytest.mark.parametrize("base", ["mixtral"], indirect=True)
def test_what_is_not_there_is_refused_by_name(base):
    model = base_model(base, "causal_lm")
    lora = LoraSection(target_modules=["q_proj"], target_parameters=["experts.gate_proj"])
    with pytest.raises(RecipeError, match=r"no stacked parameter is named 'experts.gate_proj'") as caught:
        find_targets(model, lora, [])
    assert "experts.down_proj, experts.gate_up_proj" in str(caught.value.mistakes[0].help)


@pytest.mark.parametrize("base", ["mixtral"], indirect=True)
@pytest.mark.parametrize("narrowed", [{"layers_to_transform": [1]}, {"exclude_modules": ["*.layers.0.*"]}])
def test_layers_and_exclusions_hold_for_stacked_parameters_too(base, narrowed):
    model = base_model(base, "causal_lm")
    lora = LoraSection(target_modules=["q_proj"], target_parameters=BOTH)
    every = {target.name for target in find_targets(model, lora, [])}
    found = {target.name for target in find_targets(model, lora.model_copy(update=narrowed), [])}
    assert len(every) == 2 * len(found) == 6
    assert found == {name for name in every if ".1." in name}


@pytest.mark.parametrize("base", ["mixtral"], indirect=True)
def test_experts_that_are_trained_in_full_get_no_update_as_well(base):
    model = base_model(base, "causal_lm")
    lora = LoraSection(target_modules=["q_proj"], target_parameters=BOTH[:1])
    with pytest.raises(RecipeError, match=r"which lora.modules_to_save trains in full: it needs no adapter"):
        find_targets(model, lora, find_saved(model, ["experts"]))


def test_a_model_without_experts_says_so():
    from tests.conftest import tiny_model

    with pytest.raises(RecipeError) as caught:
        find_targets(tiny_model("llama"), LoraSection(target_parameters=["experts.down_proj"]), [])
    assert caught.value.mistakes[0].help == "this model has no stacked experts"


def test_plain_experts_are_told_by_their_own_account():
    module = nn.Module()
    assert not is_plain(module)


@pytest.mark.parametrize("base", ["mixtral"], indirect=True)
def test_inspect_takes_a_stack_apart_and_what_rewrites_files_refuses_it(base, tmp_path, lora):
    model = our_adapter(base, tmp_path / "adapter", "causal_lm", target_modules=["q_proj"], target_parameters=BOTH[1:])
    found = lora("inspect", tmp_path / "adapter", "--json").json
    modules = {module["name"]: module for module in found["modules"]}
    stack = adapters_of(model)["model.layers.1.mlp.experts.down_proj"]
    with torch.no_grad():
        update = stack.update(transposed=False)
    for expert in range(3):
        facts = modules[f"model.layers.1.mlp.experts.down_proj[{expert}]"]
        assert facts["rank"] == 4
        assert facts["norm"] == pytest.approx(float(update[expert].norm()), rel=1e-5)
    for command in (["shrink", "--rank", "2"], ["export", "--for", "vllm"]):
        result = lora(command[0], tmp_path / "adapter", *command[1:], "-o", tmp_path / "new")
        assert result.code == 2
        assert "adapts stacked experts" in result.err
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("base", ["mixtral"], indirect=True)
def test_experts_keep_their_rank_beside_others(base, recipe, tmp_path, lora):
    """Most modules have another rank than the stacks: the file's own r is the stacks', which have no pattern."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=BOTH,
        rank_pattern=dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj"], 2),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base_model(base, "causal_lm"), config)
    perturb(model)
    model.save_pretrained(str(tmp_path / "first"))
    changes = {"model": {"path": str(base), "dtype": "float32"}, "training.max_steps": 1}
    still = {"training.learning_rate": 1e-9, "lora": {"init_from": str(tmp_path / "first")}}
    result = lora("train", recipe(**changes, **still), "--json")
    assert result.code == 0, result.err
    before, after = (read_adapter(folder).updates for folder in (tmp_path / "first", tmp_path / "run" / "adapter"))
    assert {n: (u.experts, u.r, u.scaling) for n, u in before.items()} == {
        n: (u.experts, u.r, u.scaling) for n, u in after.items()
    }
    assert distance(logits(loaded_by_us(tmp_path / "run" / "adapter")), logits(model)) < 1e-5
