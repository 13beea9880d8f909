"""The base model and its tokenizer: their configuration, an empty model to look at, the real one to train."""

from __future__ import annotations

import copy
import difflib
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lora_cli.errors import Mistake, RecipeError, StorageError, UsageError, first_line
from lora_cli.hub import ModelFolder, model_folder, weight_files
from lora_cli.recipe import ModelSection
from lora_cli.seeds import stream_seed
from lora_cli.tensorfile import tensor_table
from lora_cli.weights import dense_weights, is_packed

AUTO_CLASSES = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
}


TRAIN_ONE = "remove it; lora.trainable_token_indices trains the row of a token that is there"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own progress bars and advice off the screen; errors still come through."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    before = logging.get_verbosity()
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(before)


def load_config(section: ModelSection, *, remote_code: bool = False) -> tuple[PreTrainedConfig, ModelFolder | None]:
    """The model's configuration, and the folder it came from (none for an inline one)."""
    if section.config is not None:
        return _inline_config(section.config), None
    assert section.path is not None
    folder = model_folder(section.path, section.revision, weights=False, remote_code=remote_code)
    if section.revision is not None and folder.commit is None:
        raise RecipeError([Mistake(("model", "revision"), f"has no effect: {section.path} is a folder", "remove it")])
    return read_config(folder.path, remote_code=remote_code), folder


def read_config(folder: Path, *, remote_code: bool = False) -> PreTrainedConfig:
    """Raises ``UsageError`` for a folder without a ``config.json`` that transformers understands."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no config.json", "is this a model's folder?")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UsageError(f"{folder / 'config.json'} cannot be used: {first_line(error)}") from error
    attention = str(config._attn_implementation or "")
    if "/" in attention and not remote_code:  # transformers would fetch and run it
        raise UsageError(
            f"{folder / 'config.json'} names code on the hub: {attention}", "allow it with --trust-remote-code"
        )
    return config


def _inline_config(values: dict[str, Any]) -> PreTrainedConfig:
    """A configuration from a recipe; a misspelt key is refused, where transformers would keep it unread."""
    known_types = list(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    path = ("model", "config")
    kind = values["model_type"]
    if kind not in known_types:
        raise RecipeError(
            [Mistake((*path, "model_type"), f"is not a model type of transformers: {kind}", _near(kind, known_types))]
        )
    settings = {key: value for key, value in values.items() if key != "model_type"}
    default = AutoConfig.for_model(kind)
    known = {*default.to_dict(), *default.attribute_map, "num_labels", "head_dim"}  # the last two are read, not listed
    unknown = [key for key in settings if key not in known]
    if unknown:
        mistakes = [Mistake((*path, key), f"unknown key for {kind}", _near(key, known), at_key=True) for key in unknown]
        raise RecipeError(mistakes)
    try:
        return AutoConfig.for_model(kind, **settings)
    except Exception as error:
        raise RecipeError([Mistake(path, f"is not a {kind} configuration: {first_line(error)}")]) from error


def _near(word: Any, words: Any) -> str | None:
    close = difflib.get_close_matches(str(word), list(words), n=1)
    return f"did you mean {close[0]}?" if close else None


def set_labels(config: PreTrainedConfig, labels: list[str]) -> None:
    config.num_labels = len(labels)  # also resets the two tables below, so it comes first
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def model_class(config: PreTrainedConfig, task: str) -> Any:
    """The Auto class of a task, where it knows this architecture."""
    auto = AUTO_CLASSES[task]
    if type(config) not in auto._model_mapping and not getattr(config, "auto_map", None):
        raise UsageError(
            f"{config.model_type} models have no {task} form in transformers",
            "choose another task, or another model",
        )
    return auto


def empty_model(
    config: PreTrainedConfig,
    task: str,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "auto",
    remote_code: bool = False,
) -> PreTrainedModel:
    """The model's modules and shapes on the meta device: no weights are read or allocated."""
    auto = model_class(config, task)
    options = {} if dtype is None else {"dtype": dtype}
    model = build_empty(config, partial(auto.from_config, config, trust_remote_code=remote_code, **options))
    _check_attention(model, attn_implementation)
    heed_soft_cap(model)
    return model


def build_empty(config: PreTrainedConfig, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    try:
        with quiet(), torch.device("meta"):
            return build()
    except Exception as error:  # whatever a layer says of sizes that cannot be
        raise UsageError(
            f"no {config.model_type} model can be built from its configuration: {first_line(error)}"
        ) from error


def _check_attention(model: PreTrainedModel, name: str) -> None:
    if name == "auto":
        return
    path = ("model", "attn_implementation")
    if name.startswith("paged|"):
        raise RecipeError([Mistake(path, f"{name} is for generation, not for training", "use sdpa or eager")])
    if name == "sdpa" and _caps_scores(model):
        message = "sdpa would leave out this model's soft cap (attn_logit_softcapping)"
        raise RecipeError([Mistake(path, message, "use eager, or remove it")])
    try:
        with quiet():
            model.set_attn_implementation(name)
    except Exception as error:  # ValueError for an unknown name, ImportError for one that is not installed
        raise RecipeError([Mistake(path, f"{name} cannot be used here: {first_line(error)}")]) from error


def _caps_scores(model: PreTrainedModel) -> bool:
    return getattr(model.config, "attn_logit_softcapping", None) is not None


def heed_soft_cap(model: PreTrainedModel) -> None:
    """Up to transformers 5.17 the default kernel, sdpa, silently leaves Gemma 2's cap on attention scores out."""
    if model.config._attn_implementation == "sdpa" and _caps_scores(model):
        model.set_attn_implementation("eager")


def load_model(
    folder: Path,
    config: PreTrainedConfig,
    task: str,
    dtype: torch.dtype,
    *,
    attn_implementation: str = "auto",
    remote_code: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """The base with its weights on the CPU, and the parameters that the files did not hold.

    Raises ``UsageError`` for a folder without safetensors, ``StorageError`` for damaged files and for weights
    that are not finite.
    """
    weight_files(folder)
    load = _load_packed if is_packed(folder) else _load_files
    options = {"dtype": dtype, "output_loading_info": True, **_attention(attn_implementation)}
    try:
        with quiet():
            model, info = load(folder, config, task, remote_code, options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UsageError(f"{folder} cannot be loaded: {first_line(error)}") from error
    except Exception as error:
        raise StorageError(f"the weights in {folder} cannot be loaded: {first_line(error)}") from error
    check_finite(model, folder)
    heed_soft_cap(model)
    return model, sorted(info["missing_keys"])


def _load_files(folder: Path, config: PreTrainedConfig, task: str, remote_code: bool, options: dict[str, Any]) -> Any:
    auto = model_class(config, task)
    return auto.from_pretrained(folder, config=config, use_safetensors=True, trust_remote_code=remote_code, **options)


def _load_packed(folder: Path, config: PreTrainedConfig, task: str, remote_code: bool, options: dict[str, Any]) -> Any:
    """A model whose weights are unpacked here, and not by transformers: bit for bit what was packed."""
    dense = copy.deepcopy(config)
    if hasattr(dense, "quantization_config"):
        del dense.quantization_config  # transformers would pack them again
    of_task = type(empty_model(dense, task, remote_code=remote_code))
    return of_task.from_pretrained(None, config=dense, state_dict=dense_weights(folder), **options)


def random_model(
    config: PreTrainedConfig, task: str, dtype: torch.dtype, seed: int, *, attn_implementation: str = "auto"
) -> PreTrainedModel:
    with quiet():
        torch.manual_seed(stream_seed(seed, "model"))
        model = model_class(config, task).from_config(config, dtype=dtype, **_attention(attn_implementation))
    heed_soft_cap(model)
    return model


def _attention(name: str) -> dict[str, str]:
    return {} if name == "auto" else {"attn_implementation": name}


def check_finite(model: nn.Module, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise StorageError(f"{name} in {folder} holds values that are not finite", "download the model again")


def head_modules(model: PreTrainedModel, task: str) -> list[str]:
    """A classifier's head: the children beside the base that hold parameters."""
    if task != "sequence_classification":
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def load_tokenizer(section: ModelSection, *, remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Raises ``UsageError`` where there is no fast tokenizer: masks are derived from its offsets."""
    assert section.tokenizer is not None
    revision = section.revision if section.tokenizer == section.path else None
    folder = model_folder(section.tokenizer, revision, weights=False, remote_code=remote_code)
    return read_tokenizer(folder.path, remote_code=remote_code)


def read_tokenizer(folder: Path, *, remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Raises ``UsageError`` for a folder without a fast tokenizer, or with one that has no words."""
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:
        raise UsageError(
            f"{folder} holds no tokenizer that can be used: {first_line(error)}",
            "set model.tokenizer to a folder or hub id",
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes one of nothing
        raise UsageError(f"{folder} holds no tokenizer", "set model.tokenizer to a folder or hub id")
    if not tokenizer.is_fast:
        raise UsageError(f"{folder} holds no fast tokenizer (tokenizer.json)")
    return tokenizer


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> list[int]:
    """Add new tokens to a tokenizer, in place, and return their ids.

    Raises ``RecipeError`` for one that it knows already, and for one that it would not find in a text.
    """
    known = tokenizer.get_vocab()
    path = ("dataset", "new_tokens")
    there = [place for place, token in enumerate(tokens) if token in known]
    if there:
        raise RecipeError(
            [
                Mistake(
                    (*path, place), f"{tokens[place]} is a token already, with id {known[tokens[place]]}", TRAIN_ONE
                )
                for place in there
            ]
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids: list[int] = tokenizer.convert_tokens_to_ids(tokens)
    taken = {*known.values()}
    for place, (token, number) in enumerate(zip(tokens, ids, strict=True)):
        if number in taken or tokenizer(token, add_special_tokens=False)["input_ids"] != [number]:
            raise RecipeError([Mistake((*path, place), f"{token!r} cannot be a token of this tokenizer", "rename it")])
    return ids


def fingerprint(folder: Path) -> str:
    """A hash of every tensor's name, type, shape, first and last bytes: a different base has another one.

    Reads a few kilobytes a tensor instead of the whole model. Tensors are taken in the order of their names,
    so a model cut into other shards is the same model.
    """
    pieces: dict[str, bytes] = {}
    for path in weight_files(folder):
        with open(path, "rb") as file:
            for entry in tensor_table(path):
                file.seek(entry.start)
                head = file.read(min(1024, entry.end - entry.start))
                file.seek(max(entry.start, entry.end - 1024))
                tail = file.read(entry.end - file.tell())
                pieces[entry.name] = repr((entry.name, entry.dtype, entry.shape)).encode() + head + tail
    return hashlib.sha256(b"".join(pieces[name] for name in sorted(pieces))).hexdigest()


def sees_ahead(config: PreTrainedConfig) -> bool:
    """Whether a language model's tokens see those behind them: an encoder, unless it is told to be a decoder."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in names and not (getattr(config, "is_decoder", None) or getattr(config, "causal", None))


def num_embeddings(model: PreTrainedModel) -> int:
    """How many ids a model embeds; without bound where its embedding does not say."""
    return int(getattr(model.get_input_embeddings(), "num_embeddings", sys.maxsize))


def grown_vocabulary(model: PreTrainedModel, config: PreTrainedConfig) -> int | None:
    """How many words a model has, where those are more than its configuration's: somebody has added some."""
    embedded = num_embeddings(model)
    return embedded if config.get_text_config().vocab_size < embedded < sys.maxsize else None
