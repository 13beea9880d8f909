"""Which modules a recipe means, what is trained, and what is refused."""

from __future__ import annotations

from collections import Counter

import peft
import pytest
import torch
from torch import nn

from lora_cli.adapters.full import train_in_full
from lora_cli.adapters.injection import adapters_of, attach, base_name, freeze_base
from lora_cli.adapters.layer import Parametrisation
from lora_cli.adapters.patterns import ending
from lora_cli.adapters.targets import find_saved, find_targets, linear_modules, tied_partner
from lora_cli.errors import RecipeError
from lora_cli.models import empty_model
from lora_cli.recipe import LoraSection
from tests.conftest import tiny_config, tiny_model

ATTENTION = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
MLP = [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
INSIDE = "adapters go on linear layers inside the model"


def skeleton(kind: str = "llama", task: str = "causal_lm", **changes):
    return empty_model(tiny_config(kind, **changes), task)


def targets(model=None, saved: list[str] | None = None, **lora):
    return find_targets(model if model is not None else skeleton(), LoraSection(**{"r": 4} | lora), saved or [])


def names(*arguments, **lora) -> list[str]:
    return [target.name for target in targets(*arguments, **lora)]


def mistakes(*arguments, **lora) -> list[tuple[str, str, str]]:
    """(key, message, help) of every mistake."""
    with pytest.raises(RecipeError) as caught:
        targets(*arguments, **lora)
    return [(mistake.name, mistake.message, mistake.help or "") for mistake in caught.value.mistakes]


def saved_mistakes(model, patterns: list[str]) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        find_saved(model, patterns)
    return [(mistake.name, mistake.message, mistake.help or "") for mistake in caught.value.mistakes]


# all-linear


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_on_llama_is_the_seven_projections_and_never_the_head(tied):
    found = names(skeleton(tie_word_embeddings=tied))
    assert found == [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ATTENTION + MLP]


ALL_LINEAR = {
    ("gpt2", "causal_lm"): {"attn.c_attn": 2, "attn.c_proj": 2, "mlp.c_fc": 2, "mlp.c_proj": 2},
    ("gpt2", "sequence_classification"): {"attn.c_attn": 2, "attn.c_proj": 2, "mlp.c_fc": 2, "mlp.c_proj": 2},
    ("llama", "sequence_classification"): dict.fromkeys(ATTENTION + MLP, 2),
    ("bert", "sequence_classification"): {
        "self.query": 2, "self.key": 2, "self.value": 2, "output.dense": 4, "intermediate.dense": 2, "pooler.dense": 1,
    },
    ("roberta", "sequence_classification"): {
        "self.query": 2, "self.key": 2, "self.value": 2, "output.dense": 4, "intermediate.dense": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "task"), ALL_LINEAR)
def test_all_linear_is_the_right_set(kind, task):
    saved = {"bert": ["classifier"], "roberta": ["classifier"]}.get(kind, ["score"]) if task != "causal_lm" else []
    found = names(skeleton(kind, task), saved)
    assert Counter(".".join(name.split(".")[-2:]) for name in found) == ALL_LINEAR[kind, task]
    assert not any(name.startswith((*saved, "lm_head")) for name in found)


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal_lm"), *ALL_LINEAR])
def test_all_linear_is_what_peft_adapts(kind, task):
    head = {"bert": ["classifier"], "roberta": ["classifier"]}.get(kind, ["score"]) if task != "causal_lm" else None
    model = tiny_model(kind, task)
    found = names(model, head or [])
    task_type = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS"}[task]
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", modules_to_save=head, task_type=task_type, fan_in_fan_out=kind == "gpt2"
    )
    adapted = peft.get_peft_model(model, config)
    assert sorted(found) == sorted(adapted.base_model.targeted_module_names)


def test_targets_know_their_shape_rank_and_scale():
    by_name = {target.name: target for target in targets(r=4, lora_alpha=6.0)}
    down = by_name["model.layers.0.mlp.down_proj"]
    assert (down.in_features, down.out_features, down.r, down.scaling) == (48, 32, 4, 1.5)
    assert down.numel == 4 * (48 + 32)
    conv = {target.name: target for target in targets(skeleton("gpt2"))}["transformer.h.0.attn.c_attn"]
    assert (conv.in_features, conv.out_features) == (32, 96)  # stored (in, out)


def test_rslora_scales_by_the_root_of_the_rank():
    assert {target.scaling for target in targets(r=16, lora_alpha=8.0, use_rslora=True)} == {2.0}


# patterns


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"target_modules": ["q_proj"]}, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ({"target_modules": "q_proj"}, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ({"target_modules": ["1.mlp.up_proj"]}, ["1.mlp.up_proj"]),
        ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}, [f"0.{ATTENTION[0]}", f"0.{MLP[1]}"]),
        ({"target_modules": "*.layers.0.mlp.*"}, ["0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj"]),
        ({"target_modules": r"re:.*\.1\..*(q|v)_proj"}, ["1.self_attn.q_proj", "1.self_attn.v_proj"]),
        ({"exclude_modules": ["mlp.*", "*.mlp.*", "k_proj", "re:.*[vo]_proj"]}, None),
        ({"exclude_modules": ["*.mlp.*", "k_proj", r"re:.*[vo]_proj"]}, ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        ({"layers_to_transform": [1], "exclude_modules": ["*.mlp.*"]}, [f"1.{name}" for name in ATTENTION]),
    ],
)  # fmt: skip
def test_patterns_choose_exactly_these_modules(lora, expected):
    if expected is None:  # `mlp.*` speaks of the whole name and so matches nothing
        assert [key for key, _, _ in mistakes(**lora)] == ["lora.exclude_modules"]
    else:
        assert names(**lora) == [f"model.layers.{name}" for name in expected]


def test_a_module_named_twice_is_adapted_once():
    assert names(target_modules=["q_proj", "self_attn.q_proj", "*q_proj"]) == names(target_modules=["q_proj"])


def test_rank_pattern_and_alpha_pattern_change_their_modules_alone():
    found = {
        t.name: (t.r, t.scaling)
        for t in targets(
            target_modules=["q_proj", "v_proj"],
            r=4,
            lora_alpha=8.0,
            rank_pattern={"v_proj": 2, "re:.*q_proj": 8},
            alpha_pattern={"*.layers.1.*": 32.0},
        )
    }
    assert found == {
        "model.layers.0.self_attn.q_proj": (8, 1.0),
        "model.layers.0.self_attn.v_proj": (2, 4.0),
        "model.layers.1.self_attn.q_proj": (8, 4.0),
        "model.layers.1.self_attn.v_proj": (2, 16.0),
    }


def test_the_first_pattern_that_matches_wins():
    found = targets(target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 2, "q_proj": 3})
    assert [target.r for target in found] == [2, 3]


# refusals


def test_a_target_that_matches_nothing_lists_the_real_names_and_the_nearest():
    [(key, message, help)] = mistakes(target_modules=["q_prj", "v_proj"])
    assert key == "lora.target_modules"
    assert message == "no layer is named 'q_prj'"
    assert help == "did you mean q_proj? this model has: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def test_names_of_another_architecture_list_the_real_ones_without_a_guess():
    [(_, message, help)] = mistakes(skeleton("gpt2"), target_modules=["self_attn.xyz"])
    assert message == "no layer is named 'self_attn.xyz'"
    assert help == "this model has: c_attn, c_fc, c_proj"


def test_every_mistake_of_the_section_is_told_at_once():
    found = mistakes(
        target_modules=["q_prj", "re:("],
        exclude_modules=["nothing"],
        layers_to_transform=[0, 7],
        rank_pattern={"q_proj": 2, "re:[": 1},
    )
    assert Counter(key for key, _, _ in found) == {
        "lora.target_modules": 2,
        "lora.exclude_modules": 1,
        "lora.layers_to_transform": 1,
        "lora.rank_pattern.q_proj": 1,
        "lora.rank_pattern.re:[": 1,
    }
    assert "has no layer 7: this model's layers are 0 to 1" in [message for _, message, _ in found]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("lm_head", f"'lm_head' is lm_head, the output head: {INSIDE}"),
        ("*embed*", "'*embed*' is model.embed_tokens, which no pattern takes along"),
        ("mlp", f"'mlp' is model.layers.0.mlp, of type LlamaMLP: {INSIDE}"),
    ],
)  # fmt: skip
def test_heads_and_blocks_are_refused_with_the_reason(pattern, message):
    [(_, told, help)] = mistakes(target_modules=[pattern])
    assert told == message
    assert help == "name it outright: embed_tokens" if "*" in pattern else "this model has: down_proj" in help


def test_a_classifiers_head_is_trained_in_full_and_gets_no_adapter():
    [(_, message, _)] = mistakes(
        skeleton("bert", "sequence_classification"), ["classifier"], target_modules=["classifier"]
    )
    assert message == "'classifier' is classifier, which is trained in full: it needs no adapter"


def test_a_module_to_save_is_not_called_the_output_head():
    [(_, message, _)] = mistakes(saved=["model.layers.0.self_attn.q_proj"], target_modules=["0.self_attn.q_proj"])
    assert "trained in full" in message
    assert "output head" not in message


def test_excluding_everything_is_refused():
    [(key, message, _)] = mistakes(target_modules=["q_proj"], exclude_modules=["q_proj"])
    assert (key, message) == ("lora", "leaves no module to adapt: everything targeted is excluded")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_for_a_module_that_is_not_adapted_is_refused(key):
    [(where, message, help)] = mistakes(target_modules=["q_proj"], **{key: {"q_prj": 2}})
    assert (where, message) == (f"lora.{key}.q_prj", "matches no adapted module")
    assert help == "did you mean q_proj?"


def test_a_rank_above_the_matrixs_size_is_one_mistake_that_names_a_module():
    [(key, message, _)] = mistakes(r=33)
    assert key == "lora.r"
    assert message == "33 is more than the rank of model.layers.0.self_attn.q_proj (32 x 32) and 13 more"
    assert names(r=16, target_modules=["k_proj"])  # 16 x 32: exactly its rank
    [(_, message, _)] = mistakes(r=17, target_modules=["k_proj"])
    assert message == "17 is more than the rank of model.layers.0.self_attn.k_proj (16 x 32) and 1 more"


def test_a_rank_pattern_above_the_matrixs_size_is_refused_at_the_pattern():
    [(key, message, _)] = mistakes(target_modules=["q_proj"], rank_pattern={"0.self_attn.q_proj": 99})
    assert key.startswith("lora.rank_pattern")
    assert message == "99 is more than the rank of model.layers.0.self_attn.q_proj (32 x 32)"


# modules_to_save


def test_modules_to_save_are_found_by_name_and_never_get_an_adapter():
    model = skeleton(tie_word_embeddings=False)
    assert find_saved(model, ["lm_head"]) == ["lm_head"]
    saved = find_saved(model, ["1.self_attn.q_proj", "re:.*0.mlp"])
    assert saved == ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp"]
    assert not [name for name in names(model, saved) if name.startswith(tuple(saved))]
    assert len(names(model, saved)) == 14 - 4


def test_a_module_inside_another_one_is_not_saved_twice():
    assert find_saved(skeleton(), ["*.layers.0.mlp*"]) == ["model.layers.0.mlp"]
    assert find_saved(skeleton(), ["norm", "norm"]) == ["model.norm"]
    assert find_saved(skeleton(), ["0.mlp.up_proj", "0.mlp"]) == ["model.layers.0.mlp"]


def test_a_module_to_save_that_is_not_there_lists_the_real_names():
    [(key, message, help)] = saved_mistakes(skeleton(), ["lm_heed"])
    assert (key, message) == ("lora.modules_to_save", "no module is named 'lm_heed'")
    assert help.startswith("did you mean lm_head? this model has: ")
    assert "embed_tokens" in help


@pytest.mark.parametrize(
    ("pattern", "name", "partner"),
    [("lm_head", "lm_head", "model.embed_tokens"), ("embed_tokens", "model.embed_tokens", "lm_head")],
)
def test_of_a_tied_pair_both_are_saved(pattern, name, partner):
    assert find_saved(skeleton(tie_word_embeddings=True), [pattern]) == [name, partner]
    assert find_saved(skeleton(tie_word_embeddings=False), [pattern]) == [name]


def test_another_module_with_a_shared_weight_is_refused_because_training_it_would_untie():
    model = skeleton(tie_word_embeddings=False)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    [(_, message, _)] = saved_mistakes(model, ["0.mlp.up_proj"])
    name, partner = (f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1))
    assert message == f"{name} shares its weight with {partner}: training it would untie them"


def test_a_broken_expression_in_modules_to_save_is_a_mistake_not_a_crash():
    [(key, message, _)] = saved_mistakes(skeleton(), ["re:("])
    assert key == "lora.modules_to_save"
    assert "is not a regular expression" in message


def test_a_module_without_parameters_cannot_be_saved():
    [(_, message, _)] = saved_mistakes(skeleton(), ["act_fn"])
    assert message == "'act_fn' is model.layers.0.mlp.act_fn, which holds no parameters to train"


def test_tied_partner_looks_outside_the_module_only():
    model = skeleton(tie_word_embeddings=True)
    assert tied_partner(model, "model") == "lm_head"
    assert tied_partner(model, "model.layers.0") is None


# attaching and freezing


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_adapters_are_trained_and_frozen_weights_get_no_gradient(kind):
    model = tiny_model(kind)
    found = targets(model)
    attach(model, found)
    freeze_base(model, [])
    for layer in adapters_of(model).values():
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B, std=0.1)
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{t.name}.{part}" for t in found for part in ("lora_A", "lora_B")}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
        assert name not in trained or parameter.grad.abs().max() > 0, name
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(t.numel for t in found)


def test_attach_keeps_the_base_weights_and_the_names():
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = targets(model, target_modules=["q_proj", "up_proj"])
    layers = attach(model, found, Parametrisation(dropout=0.25))
    assert list(layers) == [t.name for t in found] == list(adapters_of(model))
    assert {layer.dropout.p for layer in layers.values()} == {0.25}
    after = {base_name(name): p for name, p in model.named_parameters() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_linear_modules_are_named_as_peft_would():
    endings = {ending(name) for name in linear_modules(skeleton("gpt2"))}
    assert endings == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("model.q_proj.base.weight", "model.q_proj.weight"),
        ("model.q_proj.base.bias", "model.q_proj.bias"),
        ("model.q_proj.lora_A", "model.q_proj.lora_A"),
        ("model.norm.weight", "model.norm.weight"),
        ("model.database.weight", "model.database.weight"),
        ("weight", "weight"),
    ],
)
def test_base_name_leaves_the_wrapper_out(name, base):
    assert base_name(name) == base


def test_a_head_trained_in_full_is_float32_inside_a_bfloat16_model():
    model = tiny_model("bert", "sequence_classification").bfloat16()
    attach(model, targets(model, ["classifier"]))
    for layer in adapters_of(model).values():
        nn.init.normal_(layer.lora_A)
    freeze_base(model, ["classifier"])
    logits = model(input_ids=torch.arange(8)[None]).logits
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16  # the model's code does not notice
    for parameter in model.classifier.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    assert model.bert.pooler.dense.base.weight.dtype == torch.bfloat16
    assert model.bert.pooler.dense.base.weight.grad is None


def test_a_module_trained_in_full_computes_in_float32():
    torch.manual_seed(0)
    module, x = nn.Linear(64, 3).bfloat16(), torch.randn(5, 64).bfloat16()
    coarse = module(x)
    train_in_full(module)
    exact = nn.functional.linear(x.float(), module.weight, module.bias)
    assert module(x).dtype == torch.bfloat16
    assert torch.equal(module(x), exact.bfloat16())
    assert module.weight.requires_grad
    assert torch.allclose(coarse.float(), exact, atol=0.1)


def test_a_module_saved_together_with_one_inside_it_still_computes():
    model = tiny_model("roberta", "sequence_classification").bfloat16()
    freeze_base(model, ["classifier", "classifier.dense"])
    model(input_ids=torch.arange(3, 9)[None]).logits.float().sum().backward()
    assert {p.grad.dtype for p in model.classifier.parameters()} == {torch.float32}


def test_an_embedding_trained_in_full_keeps_integer_inputs():
    module = nn.Embedding(10, 4).bfloat16()
    train_in_full(module)
    assert module(torch.tensor([1, 2])).dtype == torch.bfloat16
    assert module.weight.dtype == torch.float32
