"""Every key: a value it takes, one it refuses, and its default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lora_cli.errors import RecipeError
from lora_cli.recipe import Recipe, load_recipe
from lora_cli.recipe.messages import all_keys

START = "model: m\ndataset: d.jsonl\noutput_dir: o\n"
SECTIONS = {"model", "dataset", "lora", "lora.eva_config", "lora.lora_ga_config", "lora.loftq_config", "training"}
WHOLE = "must be a whole number, not the text 'x'"
ONE_OR_MORE = "must be 1 or more"
POSITIVE = "must be more than 0"
YES_NO = "must be true or false, not the text 'x'"
EMPTY = "must not be empty"
TEXTS = "must be a text or a list of texts, not {}"
CADENCE = "must be a number of steps, a fraction of the run between 0 and 1, or epoch, not never"
SPLIT = "must be a split such as train, train[:1000] or train[10%:50%], not train["

# key: (text of a value it takes, that value, text of one it refuses, the words of the refusal)
KEYS: dict[str, tuple[str, Any, str, str]] = {
    "task": (
        "sequence_classification",
        "sequence_classification",
        "clm",
        "must be causal_lm or sequence_classification",
    ),
    "method": ("head", "head", "lore", "must be lora, full or head, not the text 'lore'"),
    "model": ("{path: x}", {"path": "x"}, "3", "must be a section with keys, not 3"),
    "model.path": ("x", "x", "3", "must be a text, not 3"),
    "model.config": ("{model_type: llama}", {"model_type": "llama"}, "x", "must be a mapping of keys to values"),
    "model.revision": ("main", "main", "''", EMPTY),
    "model.dtype": ("bfloat16", "bfloat16", "bf16", "must be auto, float32, bfloat16 or float16, not the text 'bf16'"),
    "model.quantization": ("nf4", "nf4", "fp4", "must be none, nf4 or int8, not the text 'fp4'"),
    "model.attn_implementation": ("eager", "eager", "''", EMPTY),
    "model.tokenizer": ("t", "t", "[t]", "must be a text, not a list"),
    "dataset": ("{path: x}", {"path": ["x"]}, "3", "must be a section with keys, not 3"),
    "dataset.path": ("[a, b]", ["a", "b"], "{}", TEXTS.format("a section")),
    "dataset.name": ("main", "main", "''", EMPTY),
    "dataset.split": ("train[:10]", "train[:10]", "train[", SPLIT),
    "dataset.format": (
        "text",
        "text",
        "chat",
        "must be auto, messages, conversations, prompt_completion, instruction,",
    ),
    "dataset.columns": ("{prompt: q}", {"prompt": "q"}, "{prompt: 3}", "must be a text, not 3"),
    "dataset.chat_template": ("a.jinja", "a.jinja", "''", EMPTY),
    "dataset.system_prompt": ("Be kind.", "Be kind.", "''", EMPTY),
    "dataset.train_on_prompt": ("true", True, "x", YES_NO),
    "dataset.max_length": ("2", 2, "1", "must be 2 or more"),
    "dataset.too_long": ("split", "split", "drop", "must be truncate, skip, split or error, not the text 'drop'"),
    "dataset.new_tokens": ("[<a>, <b>]", ["<a>", "<b>"], "[3]", TEXTS.format("[3]")),
    "dataset.eval_path": ("a.jsonl", ["a.jsonl"], "[]", TEXTS.format("[]")),
    "dataset.eval_split": ("test[10%:]", "test[10%:]", "train[", SPLIT),
    "dataset.eval_size": ("0.5", 0.5, "1.5", "must be a count (0 or more) or a fraction between 0 and 1, not 1.5"),
    "dataset.max_samples": ("1", 1, "0", ONE_OR_MORE),
    "dataset.shuffle": ("false", False, "x", YES_NO),
    "dataset.on_bad_row": ("skip", "skip", "stop", "must be error or skip, not the text 'stop'"),
    "lora": ("{r: 1}", {"r": 1}, "3", "must be a section with keys, not 3"),
    "lora.r": ("1", 1, "0", ONE_OR_MORE),
    "lora.lora_alpha": ("0.5", 0.5, "0", POSITIVE),
    "lora.lora_dropout": ("0.99", 0.99, "1", "must be less than 1"),
    "lora.use_rslora": ("true", True, "x", YES_NO),
    "lora.target_modules": ("[q_proj]", ["q_proj"], "[3]", TEXTS.format("[3]")),
    "lora.target_parameters": ("[experts.down_proj]", ["experts.down_proj"], "3", TEXTS.format("3")),
    "lora.exclude_modules": ("down_proj", ["down_proj"], "['']", TEXTS.format("['']")),
    "lora.layers_to_transform": ("[0, 2]", [0, 2], "[-1]", "must be 0 or more"),
    "lora.rank_pattern": ("{q_proj: 4}", {"q_proj": 4}, "{q_proj: 0}", ONE_OR_MORE),
    "lora.alpha_pattern": ("{q_proj: 4.5}", {"q_proj": 4.5}, "{q_proj: 0}", POSITIVE),
    "lora.modules_to_save": ("[embed_tokens]", ["embed_tokens"], "3", TEXTS.format("3")),
    "lora.trainable_token_indices": ("[5, 2]", [5, 2], "[-1]", "must be 0 or more"),
    "lora.init_from": ("there", "there", "''", EMPTY),
    "lora.use_dora": ("true", True, "x", YES_NO),
    "lora.init_lora_weights": (
        "gaussian",
        "gaussian",
        "gausian",
        "must be true, gaussian, orthogonal, pissa, olora, eva, lora_ga, loftq or pissa_niter_N (N from 1 to 99), "
        "not gausian",
    ),
    "lora.eva_config": ("{rows: 2}", {"rows": 2}, "3", "must be a section with keys, not 3"),
    "lora.eva_config.rho": ("1", 1.0, "0.5", "must be 1 or more"),
    "lora.eva_config.tau": ("0.5", 0.5, "1.5", "must be 1 or less"),
    "lora.eva_config.rows": ("3", 3, "0", ONE_OR_MORE),
    "lora.lora_ga_config": ("{rows: 2}", {"rows": 2}, "3", "must be a section with keys, not 3"),
    "lora.lora_ga_config.rows": ("3", 3, "0", ONE_OR_MORE),
    "lora.loftq_config": (
        "{loftq_bits: 2}",
        {"loftq_bits": 2, "loftq_iter": 1},
        "3",
        "must be a section with keys, not 3",
    ),
    "lora.loftq_config.loftq_bits": ("3", 3, "5", "must be 2, 3, 4 or 8, not 5"),
    "lora.loftq_config.loftq_iter": ("5", 5, "0", ONE_OR_MORE),
    "training": ("{seed: 1}", {"seed": 1}, "3", "must be a section with keys, not 3"),
    "training.learning_rate": ("1e-4", 1e-4, "0", POSITIVE),
    "training.loraplus_lr_ratio": ("16", 16.0, "0", POSITIVE),
    "training.weight_decay": ("0", 0.0, "-0.1", "must be 0 or more"),
    "training.gradient_accumulation_steps": ("2", 2, "0", ONE_OR_MORE),
    "training.global_batch_size": ("64", 64, "0", ONE_OR_MORE),
    "training.per_device_train_batch_size": (
        "auto",
        "auto",
        "1.5",
        "must be a number of rows (1 or more) or auto, not 1.5",
    ),
    "training.per_device_eval_batch_size": ("2", 2, "x", "must be a number of rows (1 or more) or auto, not x"),
    "training.num_train_epochs": ("0.5", 0.5, "0", POSITIVE),
    "training.max_steps": ("1", 1, "-1", ONE_OR_MORE),
    "training.lr_scheduler_type": ("wsd", "wsd", "step", "must be linear, cosine, constant, cosine_with_min_lr or wsd"),
    "training.warmup_steps": ("10", 10, "1.0", "must be a count (0 or more) or a fraction between 0 and 1, not 1.0"),
    "training.max_grad_norm": ("null", None, "0", POSITIVE),
    "training.adam_beta1": ("0", 0.0, "1.0", "must be less than 1"),
    "training.adam_beta2": ("0.95", 0.95, "-0.1", "must be 0 or more"),
    "training.adam_epsilon": ("1e-6", 1e-6, "0.0", POSITIVE),
    "training.gradient_checkpointing": (
        "selective",
        "selective",
        "selectiv",
        "must be true, false, selective or offload, not selectiv",
    ),
    "training.cache_frozen_layers": ("disk", "disk", "ram", "must be none, memory or disk, not the text 'ram'"),
    "training.torch_compile": ("true", True, "x", YES_NO),
    "training.use_liger_kernel": ("true", True, "x", YES_NO),
    "training.strategy": ("fsdp", "fsdp", "zero", "must be ddp or fsdp, not the text 'zero'"),
    "training.use_cpu": ("true", True, "1", "must be true or false, not 1"),
    "training.seed": ("9223372036854775807", 2**63 - 1, "9223372036854775808", f"must be less than {2**63}"),
    "training.logging_steps": ("1", 1, "0", ONE_OR_MORE),
    "training.eval_steps": ("100", 100, "never", CADENCE),
    "training.save_steps": ("0.25", 0.25, "never", CADENCE),
    "training.save_dtype": (
        "float16",
        "float16",
        "fp16",
        "must be auto, float32, bfloat16 or float16, not the text 'fp16'",
    ),
    "training.save_total_limit": ("2", 2, "1", "must be 2 or more"),
    "training.early_stopping_patience": ("3", 3, "0", ONE_OR_MORE),
    "training.metric_for_best_model": ("eval_perplexity", "eval_perplexity", "''", EMPTY),
    "training.report_to": (
        "[wandb]",
        ["wandb"],
        "mlflow",
        "must be none, tensorboard, wandb, trackio, or a list of them",
    ),
    "output_dir": ("x/y", "x/y", "''", EMPTY),
}
# Keys that only go together with others.
COMPANIONS = {
    **{f"lora.eva_config{key}": ["lora.init_lora_weights=eva"] for key in ("", ".rho", ".tau", ".rows")},
    **{f"lora.lora_ga_config{key}": ["lora.init_lora_weights=lora_ga"] for key in ("", ".rows")},
    **{f"lora.loftq_config{key}": ["lora.init_lora_weights=loftq"] for key in ("", ".loftq_bits", ".loftq_iter")},
    "model.config": ["model.path=null", "model.tokenizer=t"],
    "training.early_stopping_patience": ["dataset.eval_size=1"],
    "training.metric_for_best_model": ["dataset.eval_size=1"],
    "method": ["task=sequence_classification"],
}
# DESIGN.md, section 2.2; None where a default depends on other keys or means "none of them".
DEFAULTS: dict[str, Any] = {
    "task": "causal_lm",
    "method": "lora",
    "model.config": None,
    "model.revision": None,
    "model.dtype": "auto",
    "model.quantization": "none",
    "model.attn_implementation": "auto",
    "model.tokenizer": "m",  # = path
    "dataset.name": None,
    "dataset.split": "train",
    "dataset.format": "auto",
    "dataset.columns": {},
    "dataset.chat_template": None,
    "dataset.system_prompt": None,
    "dataset.train_on_prompt": False,
    "dataset.max_length": 2048,
    "dataset.too_long": None,  # truncate; running text is split
    "dataset.new_tokens": [],
    "dataset.eval_path": None,
    "dataset.eval_split": None,
    "dataset.eval_size": 0,
    "dataset.max_samples": None,
    "dataset.shuffle": True,
    "dataset.on_bad_row": "error",
    "lora.r": 16,
    "lora.lora_alpha": 32.0,  # 2·r
    "lora.lora_dropout": 0.0,
    "lora.use_rslora": False,
    "lora.target_modules": "all-linear",
    "lora.target_parameters": [],
    "lora.exclude_modules": [],
    "lora.layers_to_transform": None,
    "lora.rank_pattern": {},
    "lora.alpha_pattern": {},
    "lora.modules_to_save": [],
    "lora.trainable_token_indices": [],
    "lora.init_from": None,
    "lora.use_dora": False,
    "lora.init_lora_weights": True,
    "lora.eva_config.rho": 2.0,
    "lora.eva_config.tau": 0.99,
    "lora.eva_config.rows": 256,
    "lora.lora_ga_config.rows": 32,
    "lora.loftq_config.loftq_bits": 4,
    "lora.loftq_config.loftq_iter": 1,
    "training.learning_rate": 2e-4,
    "training.loraplus_lr_ratio": None,
    "training.weight_decay": 0.01,
    "training.gradient_accumulation_steps": 1,
    "training.global_batch_size": None,
    "training.per_device_train_batch_size": 4,
    "training.per_device_eval_batch_size": 4,  # = train
    "training.num_train_epochs": 3.0,
    "training.max_steps": None,
    "training.lr_scheduler_type": "linear",
    "training.warmup_steps": 0.03,
    "training.max_grad_norm": 1.0,
    "training.adam_beta1": 0.9,
    "training.adam_beta2": 0.999,
    "training.adam_epsilon": 1e-8,
    "training.gradient_checkpointing": False,
    "training.cache_frozen_layers": "none",
    "training.torch_compile": False,
    "training.use_liger_kernel": False,
    "training.strategy": "ddp",
    "training.use_cpu": False,
    "training.seed": 42,
    "training.logging_steps": 10,
    "training.eval_steps": "epoch",
    "training.save_steps": "epoch",
    "training.save_dtype": "auto",
    "training.save_total_limit": 2,
    "training.early_stopping_patience": None,
    "training.metric_for_best_model": "eval_loss",
    "training.report_to": [],
}
REQUIRED = {"model.path": "m", "dataset.path": ["d.jsonl"], "output_dir": "o"}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(START)
    return path


def value_of(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_the_tables_cover_every_key():
    assert list(KEYS) == all_keys()
    assert {*DEFAULTS, *REQUIRED} == set(all_keys()) - SECTIONS


@pytest.mark.parametrize("key", KEYS)
def test_a_value_that_is_taken(key: str, start: Path):
    """It arrives, and it is not the default: so a key that is read by nothing would be seen."""
    text, value, _, _ = KEYS[key]
    got = value_of(load_recipe(start, [*COMPANIONS.get(key, []), f"{key}={text}"]).recipe, key)
    if key in SECTIONS:
        assert {name: getattr(got, name) for name in value} == value
        return
    assert got == value
    assert type(got) is type(value)
    assert key == "training.save_total_limit" or value != {**DEFAULTS, **REQUIRED}[key]


@pytest.mark.parametrize("key", KEYS)
def test_a_value_that_is_refused(key: str, start: Path):
    _, _, text, words = KEYS[key]
    with pytest.raises(RecipeError) as caught:
        load_recipe(start, [*COMPANIONS.get(key, []), f"{key}={text}"])
    message = f"  --> argument {key}={text}\n    | {key}"
    assert str(caught.value).startswith(f"{start} has 1 mistake\n{message}")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("training.adam_beta1=-0.1", "must be 0 or more"),
        ("training.adam_beta2=1", "must be less than 1"),
        ("lora.lora_dropout=-0.1", "must be 0 or more"),
        ("training.seed=-1", "must be 0 or more"),
        ("training.eval_steps=0", "must be a number of steps"),
        ("training.save_steps=1.0", "must be a number of steps"),
        ("training.report_to=[none, wandb]", "must be none, tensorboard, wandb, trackio, or a list of them"),
        ("dataset.eval_size=false", "must be a count (0 or more) or a fraction between 0 and 1, not false"),
        ("training.warmup_steps=-1", "must be a count (0 or more) or a fraction between 0 and 1, not -1"),
    ],
)
def test_other_edges(argument: str, words: str, start: Path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(start, [argument])
    assert f"{argument.partition('=')[0]} {words}" in str(caught.value)


@pytest.mark.parametrize("key", sorted(set(KEYS) - SECTIONS))
def test_null_is_taken_where_it_means_something_and_nowhere_else(key: str, start: Path):
    nullable = {key for key, default in DEFAULTS.items() if default is None}
    nullable |= {"training.max_grad_norm", "model.path", "model.tokenizer"}
    companions = ["model.config={model_type: llama}", "model.tokenizer=t"] if key == "model.path" else []
    if DEFAULTS.get(key) in ([], {}):  # as if it were left out
        assert value_of(load_recipe(start, [f"{key}=null"]).recipe, key) == DEFAULTS[key]
    elif key in nullable:
        assert value_of(load_recipe(start, [*companions, f"{key}=null"]).recipe, key) is None
    else:
        with pytest.raises(RecipeError, match="empty"):
            load_recipe(start, [f"{key}=null"])


def test_defaults(start: Path):
    recipe = load_recipe(start).recipe
    got = {key: value_of(recipe, key) for key in all_keys() if key not in SECTIONS}
    assert got == {**DEFAULTS, **REQUIRED}


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        (["lora.r=3"], "lora.lora_alpha", 6.0),
        (["lora.r=3", "lora.lora_alpha=1"], "lora.lora_alpha", 1.0),
        (["training.per_device_train_batch_size=7"], "training.per_device_eval_batch_size", 7),
        (["model.path=there"], "model.tokenizer", "there"),
    ],
)
def test_defaults_that_follow_other_keys(given: list[str], key: str, value: Any, start: Path):
    assert value_of(load_recipe(start, given).recipe, key) == value


def test_a_recipe_cannot_be_changed(start: Path):
    recipe = load_recipe(start).recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lora.r = 3
    with pytest.raises(ValidationError, match="frozen"):
        recipe.output_dir = "elsewhere"


def test_whole_numbers_are_numbers(start: Path):
    assert load_recipe(start, ["training.learning_rate=1"]).recipe.training.learning_rate == 1.0
    with pytest.raises(RecipeError, match="must be a number, not true"):
        load_recipe(start, ["training.learning_rate=true"])
