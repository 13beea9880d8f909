"""What excludes what: rules that look at more than one key.

A rule is a function from a recipe to the mistakes it finds, listed by hand in ``RULES``. Rules that need
rows or a model stand where those are known (``commands/plan.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lora_cli.errors import Mistake
from lora_cli.recipe.schema import LoraSection, Recipe, Section
from lora_cli.recipe.source import Source

EVALUATION_METRICS = {
    "causal_lm": ("eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_exact_match"),
    "sequence_classification": (
        "eval_loss",
        "eval_accuracy",
        "eval_macro_f1",
        "eval_matthews_correlation",
    ),
}

# initialisations away from zero, of the base's own weights: what they learn counts from where A and B begin
STARTS_FROM_WEIGHTS = ("pissa", "olora", "lora_ga")
OF_AN_ADAPTER = (
    *("r", "lora_alpha", "use_rslora", "target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "init_lora_weights"),
    "trainable_token_indices",
)


def check_rules(recipe: Recipe, source: Source) -> list[Mistake]:
    """Every rule that this recipe breaks."""
    return [mistake for rule in RULES for mistake in rule(recipe, source)]


def has_evaluation(recipe: Recipe) -> bool:
    data = recipe.dataset
    return bool(data.eval_path or data.eval_split or data.eval_size)


def is_quantized(recipe: Recipe) -> bool:
    """Whether some of the base's weights are packed while the run lasts."""
    return recipe.model.quantization != "none" or recipe.lora.is_loftq


def was_changed(section: Section, name: str, key: str, source: Source) -> bool:
    """Whether a key was written down with another value than its default: resolved.yaml writes them all."""
    field = type(section).model_fields[key]
    default = field.get_default(call_default_factory=True, validated_data=section.model_dump())
    return source.was_given(name, key) and getattr(section, key) != default


def _one_model(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    model = recipe.model
    if (model.path is None) == (model.config is None):
        message = (
            "needs a path, or a config for a random model"
            if model.path is None
            else ("has both a path and a config: a config builds a random model")
        )
        yield Mistake(("model",), message)
    if model.config is not None and "model_type" not in model.config:
        yield Mistake(("model", "config"), "needs model_type, for example llama")
    if model.config is not None and model.tokenizer is None:
        yield Mistake(("model",), "a random model has no tokenizer of its own: set model.tokenizer")
    if model.revision and model.path is None:
        yield Mistake(("model", "revision"), "belongs to model.path")


def _attention_is_no_code(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if "/" in recipe.model.attn_implementation:
        yield Mistake(
            ("model", "attn_implementation"),
            "names code on the hub, and a recipe is data",
            "use a name that transformers knows, such as sdpa or eager",
        )


def _float32_for_full(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.method == "full" and recipe.model.dtype in ("bfloat16", "float16"):
        yield Mistake(
            ("model", "dtype"),
            f"{recipe.model.dtype} weights lose small updates when they are trained in full",
            "use float32 (or auto) with method: full",
        )


def _quantized_is_for_lora(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    kind, method = recipe.model.quantization, recipe.method
    if kind != "none" and method != "lora":
        what = "trains the weights themselves" if method == "full" else "writes a whole model, of plain weights"
        yield Mistake(
            ("model", "quantization"),
            f"{kind} cannot be combined with method: {method}, which {what}",
            "remove it, or use method: lora",
        )


def _quantized_begins_as_it_is(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    kind, start = recipe.model.quantization, str(recipe.lora.init_lora_weights).lower()
    if kind != "none" and recipe.lora.is_loftq:
        yield Mistake(
            ("model", "quantization"),
            f"{kind} cannot be combined with init_lora_weights: loftq, which quantizes the base itself, from its dense "
            "weights",
            "remove it; lora.loftq_config.loftq_bits says how many bits",
        )
    if kind != "none" and start.startswith(STARTS_FROM_WEIGHTS):
        yield Mistake(
            ("lora", "init_lora_weights"),
            f"{start} begins from the base's own weights, and an {kind} base no longer has them",
            "use true, gaussian, orthogonal or eva, or remove model.quantization",
        )


def _quantized_is_not_sharded(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    key = "model.quantization" if recipe.model.quantization != "none" else "init_lora_weights: loftq"
    if is_quantized(recipe) and recipe.training.strategy == "fsdp":
        yield Mistake(
            ("training", "strategy"),
            f"fsdp cannot be combined with {key}: it cuts weights up by rows, and packed ones have blocks and scales "
            "instead",
            f"use ddp, or remove {key}",
        )


def _method_keys(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.method == "lora":
        return
    allowed = {"modules_to_save"} if recipe.method == "head" else set()
    for key in LoraSection.model_fields:
        if was_changed(recipe.lora, "lora", key, source) and key not in allowed:
            yield Mistake(("lora", key), f"has no effect with method: {recipe.method}", "remove it")
    if recipe.method == "head" and recipe.task == "causal_lm" and not recipe.lora.modules_to_save:
        yield Mistake(
            ("method",),
            "head trains a classifier's head, and a causal_lm has none",
            "name the modules in lora.modules_to_save, or use task: sequence_classification",
        )


def _adapter_brings_its_own(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.lora.init_from is None:
        return
    for key in OF_AN_ADAPTER:
        if was_changed(recipe.lora, "lora", key, source):
            yield Mistake(("lora", key), "comes from the adapter in init_from", "remove it")


def _start_is_not_rounded(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    kind = str(recipe.lora.init_lora_weights)
    if kind.startswith(STARTS_FROM_WEIGHTS) and recipe.training.save_dtype in ("bfloat16", "float16"):
        yield Mistake(
            ("training", "save_dtype"),
            f"{recipe.training.save_dtype} would round away what an adapter with init_lora_weights: {kind} learns: "
            "a small difference of two large products",
            "use auto or float32",
        )


def _training_of_adapters(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    for key in ("loraplus_lr_ratio", "save_dtype"):
        if recipe.method != "lora" and was_changed(recipe.training, "training", key, source):
            yield Mistake(("training", key), f"has no effect with method: {recipe.method}", "remove it")


def _experts_are_plain(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    """What PEFT's files cannot hold of a stacked parameter, or no formula gives."""
    if not recipe.lora.target_parameters:
        return
    reasons = {
        "lora_dropout": "the experts' inputs are not this adapter's to drop",
        "use_dora": "a stack of experts has no magnitudes in the file format",
        "rank_pattern": "a stack has one rank, r",
        "alpha_pattern": "a stack has one scale, lora_alpha / r",
    }
    for key, reason in reasons.items():
        if was_changed(recipe.lora, "lora", key, source):
            yield Mistake(("lora", key), f"cannot be combined with target_parameters: {reason}", "remove one of them")
    if recipe.lora.init_lora_weights not in (True, "gaussian"):
        yield Mistake(
            ("lora", "init_lora_weights"),
            f"{recipe.lora.init_lora_weights} cannot be combined with target_parameters: it begins single matrices",
            "use true or gaussian",
        )


def _something_is_adapted(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    lora = recipe.lora
    if recipe.method == "lora" and lora.init_from is None and not lora.target_modules and not lora.target_parameters:
        message = "names no module, and target_parameters none either: nothing would be adapted"
        yield Mistake(("lora", "target_modules"), message, "write all-linear, or name modules")


def _orthogonal_is_even(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.lora.init_lora_weights != "orthogonal":
        return
    odd = [(("lora", "rank_pattern", name), r) for name, r in recipe.lora.rank_pattern.items() if r % 2]
    for path, r in [*([(("lora", "r"), recipe.lora.r)] if recipe.lora.r % 2 else []), *odd]:
        yield Mistake(path, f"must be even for init_lora_weights: orthogonal, not {r}", f"use {r + 1}")


def _config_of_its_kind(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    kinds = {"eva_config": "eva", "lora_ga_config": "lora_ga", "loftq_config": "loftq"}
    for key, kind in kinds.items():
        if recipe.lora.init_lora_weights != kind and was_changed(recipe.lora, "lora", key, source):
            yield Mistake(("lora", key), f"belongs to init_lora_weights: {kind}", "remove it, or ask for that")


def _each_row_once(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    ids = recipe.lora.trainable_token_indices
    for place, token in enumerate(ids):
        if token in ids[:place]:
            yield Mistake(("lora", "trainable_token_indices", place), f"names {token} again", "remove it")


def _new_tokens_are_an_adapter_s(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    path, tokens = ("dataset", "new_tokens"), recipe.dataset.new_tokens
    if tokens and recipe.method != "lora":
        yield Mistake(path, f"cannot be used with method: {recipe.method}", "use method: lora")
    if tokens and recipe.lora.init_from is not None:
        message = "cannot be added to those of the adapter in init_from"
        yield Mistake(path, message, "remove it; model.tokenizer can name the adapter's folder")
    for place, token in enumerate(tokens):
        if token in tokens[:place]:
            yield Mistake((*path, place), f"names {token} again", "remove it")


def _task_format(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    labelled = recipe.dataset.format == "labelled"
    if recipe.task == "sequence_classification" and not labelled and recipe.dataset.format != "auto":
        yield Mistake(("dataset", "format"), "must be labelled for task: sequence_classification")
    if recipe.task == "causal_lm" and labelled:
        yield Mistake(("dataset", "format"), "labelled rows belong to task: sequence_classification")
    if recipe.task == "sequence_classification":
        for key in ("system_prompt", "train_on_prompt", "chat_template"):
            if was_changed(recipe.dataset, "dataset", key, source):
                yield Mistake(("dataset", key), "has no effect on a classifier", "remove it")


def _split_is_for_text(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    data = recipe.dataset
    if data.too_long == "split" and (data.format not in ("auto", "text") or recipe.task != "causal_lm"):
        yield Mistake(
            ("dataset", "too_long"),
            "split cuts running text only: a cut dialogue would lose its beginning",
            "use truncate, skip or error",
        )


def _evaluation_source(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    data = recipe.dataset
    given = [key for key in ("eval_path", "eval_split", "eval_size") if getattr(data, key)]
    if "eval_size" in given and len(given) > 1:
        yield Mistake(("dataset", "eval_size"), f"cannot be combined with {given[0]}: that names evaluation rows")
    training = recipe.training
    if given:
        return
    if training.early_stopping_patience:
        yield Mistake(
            ("training", "early_stopping_patience"),
            "needs evaluation rows",
            "set dataset.eval_size, eval_path or eval_split",
        )
    if was_changed(training, "training", "metric_for_best_model", source):
        yield Mistake(
            ("training", "metric_for_best_model"),
            "needs evaluation rows",
            "set dataset.eval_size, eval_path or eval_split",
        )


def _known_metric(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    known = EVALUATION_METRICS[recipe.task]
    if recipe.training.metric_for_best_model not in known:
        yield Mistake(("training", "metric_for_best_model"), f"must be one of {', '.join(known)}")


def _warmup_fits(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    training = recipe.training
    if training.max_steps and training.warmup_steps >= 1 and training.warmup_steps >= training.max_steps:
        yield Mistake(
            ("training", "warmup_steps"),
            f"{training.warmup_steps} steps of warm-up do not fit into {training.max_steps} steps",
        )


def _one_batch_size(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    both = ("global_batch_size", "gradient_accumulation_steps")
    if recipe.training.global_batch_size is not None and all(source.was_given("training", key) for key in both):
        yield Mistake(
            ("training", "gradient_accumulation_steps"),
            "cannot be combined with global_batch_size: the accumulation follows from that",
            "name one of them",
        )


def _auto_tries_alone(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.training.strategy == "fsdp" and recipe.training.per_device_train_batch_size == "auto":
        yield Mistake(
            ("training", "per_device_train_batch_size"),
            "auto cannot be combined with strategy: fsdp: each process tries sizes by itself, and its layers need all",
            "write a number of rows",
        )


def _fsdp_is_for_lora(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    if recipe.training.strategy == "fsdp" and recipe.method != "lora":
        yield Mistake(
            ("training", "strategy"),
            f"fsdp shards a base that stays frozen, and method: {recipe.method} writes a whole model",
            "use ddp, or method: lora",
        )


def _fsdp_runs_every_layer(recipe: Recipe, source: Source) -> Iterator[Mistake]:
    training = recipe.training
    if training.strategy != "fsdp":
        return
    if training.cache_frozen_layers != "none":
        yield Mistake(
            ("training", "cache_frozen_layers"),
            "cannot be combined with fsdp: a process that skips a layer is missed by those that gather it",
            "use strategy: ddp, or remove it",
        )
    if training.gradient_checkpointing == "offload":
        yield Mistake(
            ("training", "gradient_checkpointing"),
            "offload cannot be combined with fsdp: it runs a layer's backward pass on its own, out of the order in "
            "which layers are gathered",
            "use true or selective",
        )


RULES: list[Callable[[Recipe, Source], Iterator[Mistake]]] = [
    _one_model,
    _attention_is_no_code,
    _float32_for_full,
    _quantized_is_for_lora,
    _quantized_begins_as_it_is,
    _quantized_is_not_sharded,
    _method_keys,
    _adapter_brings_its_own,
    _start_is_not_rounded,
    _training_of_adapters,
    _experts_are_plain,
    _something_is_adapted,
    _orthogonal_is_even,
    _config_of_its_kind,
    _each_row_once,
    _new_tokens_are_an_adapter_s,
    _task_format,
    _split_is_for_text,
    _evaluation_source,
    _known_metric,
    _warmup_fits,
    _one_batch_size,
    _auto_tries_alone,
    _fsdp_is_for_lora,
    _fsdp_runs_every_layer,
]
