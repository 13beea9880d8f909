"""A recipe's rows as tokens, and whether they fit the keys that read them and the model that they are for."""

from __future__ import annotations

from functools import partial

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lora_cli.commands.labels import choose_labels
from lora_cli.commands.trainable import ModelPlan
from lora_cli.data.dataset import Dataset, Reading, build_dataset, read_eval, read_train
from lora_cli.data.encoding import Example, LabelEncoder, TextEncoder
from lora_cli.data.files import is_local
from lora_cli.data.formats import Content
from lora_cli.errors import Mistake, RecipeError, UsageError
from lora_cli.models import add_tokens, load_config, load_tokenizer, num_embeddings, quiet
from lora_cli.recipe import DatasetSection, LoadedRecipe, Recipe, located

POSITION_TABLES = ("wpe", "position_embeddings", "embed_positions", "positions_embed")


def read_dataset(loaded: LoadedRecipe) -> Dataset:
    """The run's rows as tokens, whatever this machine could train: what a merge is compared on."""
    with located(loaded), quiet():
        recipe = loaded.recipe
        config, _ = load_config(recipe.model)
        tokenizer = load_tokenizer(recipe.model)
        add_tokens(tokenizer, recipe.dataset.new_tokens)
        readings = read_rows(recipe)
        return encode(recipe, tokenizer, choose_labels(recipe, config, readings[0]), readings)


def read_rows(recipe: Recipe) -> tuple[Reading, Reading | None]:
    return read_train(recipe.dataset, recipe.task), read_eval(recipe.dataset, recipe.task)


def encode(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, labels: list[str], readings: tuple[Reading, Reading | None]
) -> Dataset:
    section = recipe.dataset
    encoder = LabelEncoder(section, tokenizer, labels) if labels else TextEncoder(section, tokenizer)
    _check_section(section, tokenizer, readings[0].format)
    return build_dataset(section, partial(_examples, encoder), readings[0], readings[1], recipe.training.seed)


def _check_section(section: DatasetSection, tokenizer: PreTrainedTokenizerFast, format: str) -> None:
    """Keys that these rows would leave without effect are refused, once the rows' format is known."""
    mistakes = []
    if section.too_long == "split" and format != "text":
        message = f"split cuts running text only, and these rows are {format}"
        mistakes.append(Mistake(("dataset", "too_long"), message, "use truncate, skip or error"))
    plain = format == "text" or (
        format in ("prompt_completion", "instruction") and not (section.chat_template or tokenizer.chat_template)
    )
    unused = {
        "chat_template": format == "text",
        "system_prompt": plain,
        "train_on_prompt": format == "text",
        "name": all(is_local(path) for path in section.path),
    }
    for key, has_no_effect in unused.items():
        if has_no_effect and getattr(section, key):
            what = (
                "local files"
                if key == "name"
                else f"rows read as {format}" + (" without a chat template" if plain and format != "text" else "")
            )
            mistakes.append(Mistake(("dataset", key), f"has no effect on {what}", "remove it"))
    if mistakes:
        raise RecipeError(mistakes)


def _examples(encoder: TextEncoder | LabelEncoder, content: Content, where: str) -> list[Example]:
    return list(encoder.examples(content, where))


def check_ids(dataset: Dataset, model: PreTrainedModel, loaded: LoadedRecipe) -> None:
    """Ids and positions that the model has no embedding for would crash, or worse, wrap around."""
    examples = [*dataset.train, *dataset.eval]
    largest = max(int(example.input_ids.max()) for example in examples)
    rows = num_embeddings(model)
    if largest >= rows:
        raise UsageError(
            f"the tokenizer gives id {largest}, and the model embeds ids below {rows} only",
            "set model.tokenizer to the model's own tokenizer",
        )
    limit = position_limit(model)
    longest = max(dataset.train_counts.longest, dataset.eval_counts.longest)
    if limit is not None and longest > limit:
        message = f"rows reach {longest} tokens, and the model has positions for {limit}"
        raise RecipeError([Mistake(("dataset", "max_length"), message, f"set dataset.max_length: {limit}")])


def check_words(recipe: Recipe, model: ModelPlan, words: int) -> None:
    """The new words of an adapter to go on from must be the tokenizer's too, or nothing would reach their rows."""
    trained = [index for ids in model.rows.values() for index in ids]
    if recipe.lora.init_from is not None and max(trained, default=0) >= words:
        message = f"has {words} words, and the adapter in lora.init_from trains rows up to {max(trained)}"
        raise RecipeError([Mistake(("model", "tokenizer"), message, f"set model.tokenizer: {recipe.lora.init_from}")])


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions a model with a fixed table of them has; None where positions are computed.

    RoBERTa's begin behind the pad id, OPT's behind an offset; GPT-J keeps its rotary table at a fixed length.
    """
    if model.config.model_type in ("gptj", "codegen"):
        return int(model.config.n_positions)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in POSITION_TABLES:
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - skipped - int(getattr(module, "offset", 0))
    return None
