"""Rules across keys: each is broken by one recipe and kept by its nearest neighbour."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_cli.errors import RecipeError
from lora_cli.recipe import load_recipe
from lora_cli.recipe.rules import RULES
from lora_cli.recipe.rules.facts import EVALUATION_METRICS

START = "model: m\ndataset: d.jsonl\noutput_dir: o\n"
CLASSIFY = "task=sequence_classification"
RANDOM = ["model.path=null", "model.tokenizer=t", "model.config={model_type: llama}"]
NEEDS_ROWS = "needs evaluation rows"
METRIC = "training.metric_for_best_model"

# (rule, arguments that break it, the key it names, the message, arguments that keep it)
BROKEN: list[tuple[str, list[str], str, str, list[str]]] = [
    *(
        (
            "_adapter_brings_its_own",
            ["lora.init_from=there", f"lora.{key}={value}"],
            f"lora.{key}",
            "comes from the adapter in init_from",
            [f"lora.{key}={value}"],
        )
        for key, value in {
            "r": "4",
            "lora_alpha": "4",
            "use_rslora": "true",
            "target_modules": "[q_proj]",
            "target_parameters": "[experts.down_proj]",
            "exclude_modules": "[q_proj]",
            "layers_to_transform": "[0]",
            "rank_pattern": "{q_proj: 2}",
            "alpha_pattern": "{q_proj: 2}",
            "modules_to_save": "[norm]",
            "trainable_token_indices": "[5]",
            "use_dora": "true",
            "init_lora_weights": "gaussian",
        }.items()
    ),
    *(
        (
            "_start_is_not_rounded",
            [f"lora.init_lora_weights={kind}", f"training.save_dtype={dtype}"],
            "training.save_dtype",
            f"{dtype} would round away what an adapter with init_lora_weights: {kind} learns",
            [f"lora.init_lora_weights={kind}", "training.save_dtype=float32"],
        )
        for kind, dtype in [("pissa_niter_4", "bfloat16"), ("olora", "float16"), ("lora_ga", "bfloat16")]
    ),
    *(
        (
            "_training_of_adapters",
            [CLASSIFY, "method=head", f"training.{key}={value}"],
            f"training.{key}",
            "has no effect with method: head",
            [f"training.{key}={value}"],
        )
        for key, value in {"loraplus_lr_ratio": "16", "save_dtype": "float16"}.items()
    ),
    *(
        (
            "_experts_are_plain",
            ["lora.target_parameters=[experts.down_proj]", f"lora.{key}={value}"],
            f"lora.{key}",
            message,
            [f"lora.{key}={value}"],
        )
        for key, value, message in [
            ("lora_dropout", "0.1", "cannot be combined with target_parameters: the experts' inputs"),
            ("use_dora", "true", "cannot be combined with target_parameters: a stack of experts has no magnitudes"),
            ("rank_pattern", "{q_proj: 2}", "cannot be combined with target_parameters: a stack has one rank"),
            ("alpha_pattern", "{q_proj: 2}", "cannot be combined with target_parameters: a stack has one scale"),
            ("init_lora_weights", "pissa", "pissa cannot be combined with target_parameters"),
        ]
    ),
    (
        "_something_is_adapted",
        ["lora.target_modules=[]"],
        "lora.target_modules",
        "names no module, and target_parameters none either",
        ["lora.target_modules=[]", "lora.target_parameters=[experts.down_proj]"],
    ),
    (
        "_config_of_its_kind",
        ["lora.loftq_config={loftq_bits: 2}"],
        "lora.loftq_config",
        "belongs to init_lora_weights: loftq",
        ["lora.init_lora_weights=loftq", "lora.loftq_config={loftq_bits: 2}"],
    ),
    (
        "_quantized_begins_as_it_is",
        ["model.quantization=nf4", "lora.init_lora_weights=loftq"],
        "model.quantization",
        "nf4 cannot be combined with init_lora_weights: loftq",
        ["lora.init_lora_weights=loftq"],
    ),
    (
        "_orthogonal_is_even",
        ["lora.init_lora_weights=orthogonal", "lora.r=5"],
        "lora.r",
        "must be even for init_lora_weights: orthogonal, not 5",
        ["lora.init_lora_weights=orthogonal", "lora.r=6"],
    ),
    (
        "_orthogonal_is_even",
        ["lora.init_lora_weights=orthogonal", "lora.rank_pattern={q_proj: 3}"],
        "lora.rank_pattern.q_proj",
        "must be even for init_lora_weights: orthogonal, not 3",
        ["lora.init_lora_weights=orthogonal", "lora.rank_pattern={q_proj: 2}"],
    ),
    (
        "_config_of_its_kind",
        ["lora.eva_config={rho: 1.0}"],
        "lora.eva_config",
        "belongs to init_lora_weights: eva",
        ["lora.init_lora_weights=eva", "lora.eva_config={rho: 1.0}"],
    ),
    (
        "_config_of_its_kind",
        ["lora.init_lora_weights=eva", "lora.lora_ga_config={rows: 1}"],
        "lora.lora_ga_config",
        "belongs to init_lora_weights: lora_ga",
        ["lora.init_lora_weights=lora_ga", "lora.lora_ga_config={rows: 1}"],
    ),
    (
        "_quantized_is_for_lora",
        ["model.quantization=nf4", "method=full"],
        "model.quantization",
        "nf4 cannot be combined with method: full, which trains the weights themselves",
        ["model.quantization=nf4"],
    ),
    (
        "_quantized_is_for_lora",
        ["model.quantization=int8", "method=head", CLASSIFY],
        "model.quantization",
        "int8 cannot be combined with method: head, which writes a whole model, of plain weights",
        ["method=head", CLASSIFY],
    ),
    (
        "_quantized_begins_as_it_is",
        ["model.quantization=nf4", "lora.init_lora_weights=pissa_niter_4"],
        "lora.init_lora_weights",
        "pissa_niter_4 begins from the base's own weights, and an nf4 base no longer has them",
        ["model.quantization=nf4", "lora.init_lora_weights=eva"],
    ),
    (
        "_quantized_begins_as_it_is",
        ["model.quantization=int8", "lora.init_lora_weights=lora_ga"],
        "lora.init_lora_weights",
        "lora_ga begins from the base's own weights, and an int8 base no longer has them",
        ["lora.init_lora_weights=lora_ga"],
    ),
    (
        "_each_row_once",
        ["lora.trainable_token_indices=[5, 2, 5]"],
        "lora.trainable_token_indices",
        "names 5 again",
        ["lora.trainable_token_indices=[5, 2, 4]"],
    ),
    *(
        ("_new_tokens_are_an_adapter_s", [f"dataset.new_tokens={tokens}", *more], "dataset.new_tokens", message, kept)
        for tokens, more, message, kept in [
            ("[<a>]", ["method=full"], "cannot be used with method: full", ["dataset.new_tokens=[<a>]"]),
            ("[<a>]", ["lora.init_from=x"], "cannot be added to those of the adapter", ["dataset.new_tokens=[<a>]"]),
            ("[<a>, <a>]", [], "names <a> again", ["dataset.new_tokens=[<a>, <b>]"]),
        ]
    ),
    ("_one_model", ["model.path=null"], "model", "needs a path, or a config for a random model", []),
    ("_one_model", ["model.config={model_type: llama}"], "model", "has both a path and a config", RANDOM),
    ("_one_model", [*RANDOM, "model.config={}"], "model.config", "needs model_type, for example llama", RANDOM),
    ("_one_model", [*RANDOM, "model.tokenizer=null"], "model", "a random model has no tokenizer of its own", RANDOM),
    ("_one_model", [*RANDOM, "model.revision=x"], "model.revision", "belongs to model.path", ["model.revision=x"]),
    (
        "_attention_is_no_code",
        ["model.attn_implementation=org/kernel"],
        "model.attn_implementation",
        "names code on the hub, and a recipe is data",
        ["model.attn_implementation=sdpa"],
    ),
    *(
        (
            "_float32_for_full",
            ["method=full", f"model.dtype={dtype}"],
            "model.dtype",
            f"{dtype} weights lose small updates when they are trained in full",
            neighbour,
        )
        for dtype, neighbour in [
            ("bfloat16", ["method=full", "model.dtype=float32"]),
            ("float16", ["method=lora", "model.dtype=float16"]),
        ]
    ),
    ("_method_keys", ["method=full", "lora.r=4"], "lora.r", "has no effect with method: full", ["lora.r=4"]),
    (
        "_method_keys",
        [CLASSIFY, "method=head", "lora.r=4"],
        "lora.r",
        "has no effect with method: head",
        [CLASSIFY, "lora.r=4"],
    ),
    (
        "_method_keys",
        ["method=full", "lora.modules_to_save=[a]"],
        "lora.modules_to_save",
        "has no effect with method: full",
        ["method=head", "lora.modules_to_save=[a]"],
    ),
    (
        "_method_keys",
        ["method=head"],
        "method",
        "head trains a classifier's head, and a causal_lm has none",
        [CLASSIFY, "method=head"],
    ),
    *(
        (
            "_task_format",
            [CLASSIFY, f"dataset.format={format}"],
            "dataset.format",
            "must be labelled for task: sequence_classification",
            [f"dataset.format={format}"],
        )
        for format in ("messages", "conversations", "prompt_completion", "instruction", "text")
    ),
    (
        "_task_format",
        ["dataset.format=labelled"],
        "dataset.format",
        "labelled rows belong to task: sequence_classification",
        [CLASSIFY, "dataset.format=labelled"],
    ),
    *(
        (
            "_task_format",
            [CLASSIFY, f"dataset.{key}={value}"],
            f"dataset.{key}",
            "has no effect on a classifier",
            [f"dataset.{key}={value}"],
        )
        for key, value in [("system_prompt", "x"), ("train_on_prompt", "true"), ("chat_template", "x")]
    ),
    *(
        (
            "_split_is_for_text",
            ["dataset.too_long=split", *more],
            "dataset.too_long",
            "split cuts running text only",
            neighbour,
        )
        for more, neighbour in [
            (["dataset.format=messages"], ["dataset.too_long=split", "dataset.format=text"]),
            (["dataset.format=prompt_completion"], ["dataset.too_long=split"]),
            ([CLASSIFY], [CLASSIFY, "dataset.too_long=skip"]),
        ]
    ),
    *(
        (
            "_evaluation_source",
            ["dataset.eval_size=0.1", f"dataset.{key}=x"],
            "dataset.eval_size",
            f"cannot be combined with {key}",
            [f"dataset.{key}=x"],
        )
        for key in ("eval_path", "eval_split")
    ),
    *(
        ("_evaluation_source", [argument], argument.partition("=")[0], NEEDS_ROWS, [argument, rows])
        for argument in ("training.early_stopping_patience=2", f"{METRIC}=eval_perplexity")
        for rows in ("dataset.eval_size=3", "dataset.eval_size=0.1", "dataset.eval_path=x", "dataset.eval_split=x")
    ),
    *(
        (
            "_known_metric",
            ["dataset.eval_size=1", task, f"{METRIC}={metric}"],
            METRIC,
            "must be one of eval_loss, ",
            neighbour,
        )
        for task, metric, neighbour in [
            ("task=causal_lm", "eval_accuracy", ["dataset.eval_size=1", CLASSIFY, f"{METRIC}=eval_accuracy"]),
            (CLASSIFY, "eval_perplexity", ["dataset.eval_size=1", f"{METRIC}=eval_perplexity"]),
            (CLASSIFY, "loss", ["dataset.eval_size=1", f"{METRIC}=eval_loss"]),
        ]
    ),
    (
        "_warmup_fits",
        ["training.warmup_steps=10", "training.max_steps=10"],
        "training.warmup_steps",
        "10 steps of warm-up do not fit into 10 steps",
        ["training.warmup_steps=9", "training.max_steps=10"],
    ),
    (
        "_one_batch_size",
        ["training.global_batch_size=8", "training.gradient_accumulation_steps=1"],
        "training.gradient_accumulation_steps",
        "cannot be combined with global_batch_size",
        ["training.global_batch_size=null", "training.gradient_accumulation_steps=1"],
    ),
    (
        "_auto_tries_alone",
        ["training.strategy=fsdp", "training.per_device_train_batch_size=auto"],
        "training.per_device_train_batch_size",
        "auto cannot be combined with strategy: fsdp",
        ["training.strategy=ddp", "training.per_device_train_batch_size=auto"],
    ),
    *(
        (
            "_fsdp_is_for_lora",
            [CLASSIFY, f"method={method}", "training.strategy=fsdp"],
            "training.strategy",
            f"fsdp shards a base that stays frozen, and method: {method} writes a whole model",
            [CLASSIFY, f"method={method}", "training.strategy=ddp"],
        )
        for method in ("full", "head")
    ),
    *(
        (
            "_fsdp_runs_every_layer",
            ["training.strategy=fsdp", f"training.{key}={value}", "lora.layers_to_transform=[1]"],
            f"training.{key}",
            message,
            ["training.strategy=ddp", f"training.{key}={value}", "lora.layers_to_transform=[1]"],
        )
        for key, value, message in [
            ("cache_frozen_layers", "disk", "cannot be combined with fsdp"),
            ("gradient_checkpointing", "offload", "offload cannot be combined with fsdp"),
        ]
    ),
]


@pytest.fixture
def start(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(START)
    return path


@pytest.mark.parametrize(("rule", "arguments", "key", "message", "neighbour"), BROKEN)
def test_rules(rule: str, arguments: list[str], key: str, message: str, neighbour: list[str], start: Path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(start, arguments)
    (mistake,) = caught.value.mistakes
    assert mistake.name == key
    assert mistake.message.startswith(message)
    load_recipe(start, neighbour)


def test_every_rule_is_broken_once_at_least():
    assert {rule for rule, *_ in BROKEN} == {rule.__name__ for rule in RULES}


def test_all_broken_rules_are_told_at_once(start: Path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(start, ["method=full", "model.dtype=float16", "lora.r=1", f"{METRIC}=x", "dataset.format=labelled"])
    assert [m.name for m in caught.value.mistakes] == ["model.dtype", "lora.r", "dataset.format", METRIC, METRIC]


def test_a_key_with_its_default_breaks_no_rule(start: Path):
    """resolved.yaml writes every key, and must be a recipe again."""
    load_recipe(start, ["method=full", "lora={r: 16, lora_alpha: 32, use_rslora: false}", f"{METRIC}=eval_loss"])
    load_recipe(start, [CLASSIFY, "dataset={path: d, system_prompt: null, train_on_prompt: false}"])


@pytest.mark.parametrize("task", EVALUATION_METRICS)
def test_every_metric_that_a_task_has_may_decide(task: str, start: Path):
    for metric in EVALUATION_METRICS[task]:
        load_recipe(start, [f"task={task}", "dataset.eval_size=1", f"{METRIC}={metric}"])
