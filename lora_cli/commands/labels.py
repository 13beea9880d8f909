"""The labels that shape a classifier's head."""

from __future__ import annotations

from transformers import PreTrainedConfig

from lora_cli.data.dataset import Reading, labels_of
from lora_cli.errors import DataError
from lora_cli.recipe import Recipe


def choose_labels(recipe: Recipe, config: PreTrainedConfig, train: Reading) -> list[str]:
    """The head's labels: those it was trained with, those an inline config asks for, else those in the rows.

    Empty for a task without labels. Raises ``DataError`` for rows that do not fit the head.
    """
    if recipe.task != "sequence_classification":
        return []
    found = labels_of([train])
    if len(found) < 2:
        raise DataError(f"every row has the same label ({', '.join(found) or 'none'}): there is nothing to tell apart")
    fixed = fixed_labels(recipe, config)
    if fixed is None:
        return found
    unknown = [label for label in found if label not in fixed and label not in map(str, range(len(fixed)))]
    if unknown:
        raise DataError(
            f"the labels do not fit the head: the rows have {', '.join(unknown)}, the model knows {', '.join(fixed)}",
            "rename the labels, or start from a model without a classifier's head",
        )
    return fixed


def fixed_labels(recipe: Recipe, config: PreTrainedConfig) -> list[str] | None:
    """The labels that do not depend on the rows, if the head has such."""
    trained = any("SequenceClassification" in name for name in config.architectures or [])
    asked = "num_labels" in (recipe.model.config or {})
    return [str(config.id2label[index]) for index in range(config.num_labels)] if trained or asked else None
