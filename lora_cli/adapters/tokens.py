"""Single rows of a model's word tables that are trained, while the rest of the table stays frozen.

Shape suffixes: V vocabulary, D hidden size, T trained rows; `...` any leading dimensions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lora_cli.adapters.embedding import OverTable, is_plain_table
from lora_cli.adapters.targets import is_below, tied_partner
from lora_cli.errors import Mistake, RecipeError

ROWS = "trainable_tokens_delta"  # PEFT's name, though they are the rows themselves and no difference
KEY = ("lora", "trainable_token_indices")


@dataclass(frozen=True)
class TokenRows:
    """Rows (T, D) of a file, which stand in a table in the places of these T ids."""

    ids: list[int]
    rows: Tensor

    @property
    def is_whole(self) -> bool:
        """Whether each row has one id of its own."""
        known = all(type(i) is int and i >= 0 for i in self.ids)
        return known and self.rows.ndim == 2 and len(set(self.ids)) == len(self.ids) == len(self.rows) > 0

    def mismatch(self, shape: tuple[int, ...] | None) -> str | None:
        """What keeps them from fitting a table of this shape."""
        if shape is None:
            return "the base has no such table"
        if self.rows.shape[1:] == shape[1:] and max(self.ids) < shape[0]:
            return None
        return f"the adapter has rows of {self.rows.shape[1]} up to id {max(self.ids)}, the base has {shape}"


class _RowsOver(nn.Module):
    """A frozen table (V, D) with other rows (T, D) in the places ``ids``."""

    ids_T: Tensor

    def __init__(self, base: Any, ids: list[int]) -> None:
        super().__init__()
        self.base = base
        self.ids = tuple(ids)
        self.register_buffer("ids_T", torch.tensor(ids, device=base.weight.device), persistent=False)

    def _own_rows(self) -> nn.Parameter:
        return nn.Parameter(self.base.weight.detach()[self.ids_T].float())

    # Model code that looks at a table's weight (its dtype, its shape) finds the base's.
    @property
    def weight(self) -> Tensor:
        return self.base.weight


class TrainedTokens(OverTable, _RowsOver):
    """An embedding some of whose rows are trained, in float32 whatever the table is stored in.

    They stand in the table's place, as in PEFT's trainable_token_indices (``TrainableTokensLayer``), and begin as
    the table's own: the output is then the base's, bit for bit. A table that scales what it looks up (Gemma's)
    scales them alike.
    """

    place_V: Tensor

    def __init__(self, base: nn.Embedding, ids: list[int]) -> None:
        super().__init__(base, ids)
        place_V = torch.full((base.num_embeddings,), len(ids), device=base.weight.device)
        place_V[self.ids_T] = torch.arange(len(ids), device=base.weight.device)
        self.register_buffer("place_V", place_V, persistent=False)  # T: not trained
        self.trainable_tokens_delta = self._own_rows()

    def forward(self, ids: Tensor) -> Tensor:
        y_D = self.base(ids)
        place, count = self.place_V[ids], len(self.ids)
        rows_TD = F.pad(self.trainable_tokens_delta, (0, 0, 0, 1))  # a last one for the words that have none
        z_D = F.embedding(place, rows_TD, padding_idx=count).to(y_D.dtype)
        return torch.where((place < count)[..., None], self.scaled(z_D), y_D)


class TrainedOutputs(_RowsOver):
    """The output head over such rows: those of the embedding it is tied to, else its own."""

    def __init__(self, base: nn.Linear, ids: list[int], tied: TrainedTokens | None = None) -> None:
        super().__init__(base, ids)
        self._tied = (tied,)  # in a tuple, so that the embedding does not count as a part of the head
        if tied is None:
            self.trainable_tokens_delta = self._own_rows()

    @property
    def rows(self) -> Tensor:
        """(T, D) float32."""
        tied = self._tied[0]
        return self.trainable_tokens_delta if tied is None else tied.trainable_tokens_delta

    def forward(self, h_D: Tensor) -> Tensor:
        bias_T = None if self.base.bias is None else self.base.bias[self.ids_T]
        return self.base(h_D).index_copy(-1, self.ids_T, F.linear(h_D, self.rows.to(h_D.dtype), bias_T))

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias


@torch.no_grad()
def make_room(model: PreTrainedModel, new: list[int]) -> None:
    """Give new tokens rows in the embedding and the head, in place: the mean of the rows before them.

    Tables that have no rows for them grow, and with them the vocabulary in the model's configuration.
    """
    if not new:
        return
    if max(new) >= model.get_input_embeddings().weight.shape[0]:
        model.config = copy.deepcopy(model.config)  # other models may be built from the one that was given
        model.resize_token_embeddings(max(new) + 1, mean_resizing=False)
    for table in word_tables(model).values():
        table.weight[new] = table.weight[: min(new)].mean(0, dtype=torch.float32).to(table.weight.dtype)


def make_room_for(model: PreTrainedModel, tables: dict[str, TokenRows]) -> None:
    """The same for an adapter with rows behind those of its base: they must be the next ones, in each word table."""
    count = model.get_input_embeddings().weight.shape[0]
    new = sorted({i for table in tables.values() for i in table.ids if i >= count})
    covered = {name for name, table in tables.items() if {*new} <= {*table.ids}}
    is_next = new == list(range(count, count + len(new)))
    if is_next and all(name in covered or tied_partner(model, name) in covered for name in word_tables(model)):
        make_room(model, new)


def word_tables(model: PreTrainedModel) -> dict[str, Any]:
    """The input embedding and the output head, by name."""
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is one for one in found)}


def find_rows(
    model: PreTrainedModel,
    ids: list[int],
    saved: list[str],
    new: list[int] | None = None,
    adapted: list[str] | None = None,
) -> dict[str, list[int]]:
    """The rows to train: of the input embedding those that `trainable_token_indices` names, by its name.

    Rows of ``new`` tokens, for which there is room already, are trained there too, and in a head of its own. Raises
    ``RecipeError`` for ids that the model does not embed, and for tables that cannot be trained so: those trained in
    full (``saved``) or ``adapted`` among them.
    """
    new = new or []
    tables = word_tables(model) if ids or new else {}
    rows: dict[str, list[int]] = {}
    for name, table in tables.items():
        is_head = table is not model.get_input_embeddings()
        if is_head and (not new or tied_partner(model, name)):
            continue
        if reason := _why_not(model, name, table, saved, adapted or []):
            raise RecipeError([Mistake(("dataset", "new_tokens") if new else KEY, reason, "remove it")])
        rows[name] = new if is_head else [*_known(table, ids), *(i for i in new if i not in ids)]
    return rows


def _known(table: Any, ids: list[int]) -> list[int]:
    last = table.weight.shape[0] - 1
    mistakes = [
        Mistake((*KEY, place), f"has no row {i}: this model embeds ids 0 to {last}")
        for place, i in enumerate(ids)
        if i > last
    ]
    if mistakes:
        raise RecipeError(mistakes)
    return ids


def _why_not(model: PreTrainedModel, name: str, table: Any, saved: list[str], adapted: list[str]) -> str | None:
    """What keeps single rows of a table from being trained."""
    if is_below(name, saved):
        return f"trains rows of {name}, which is trained in full"
    if name in adapted:
        return f"trains rows of {name}, which has an adapter"
    partner, head = tied_partner(model, name), model.get_output_embeddings()
    if partner is not None and type(head) is not nn.Linear:
        return f"cannot be used: {name} shares its weight with {partner}, which is no plain output head"
    if getattr(head, "bias", None) is not None and (table is head or partner is not None):
        return "cannot be used: this model's output head has a bias, which PEFT leaves out where it trains rows"
    if type(table) is not nn.Linear and not is_plain_table(table):
        return f"cannot be used: {name} of this model is a {type(table).__name__}, and no plain table"
    return None


def attach_rows(model: PreTrainedModel, rows: dict[str, list[int]]) -> None:
    """Train these rows of each table, in place; a head that is tied to the embedding uses the same rows."""
    for name, ids in rows.items():
        table = model.get_submodule(name)
        partner = tied_partner(model, name)
        if not isinstance(table, nn.Embedding):
            model.set_submodule(name, TrainedOutputs(table, ids))
            continue
        trained = TrainedTokens(table, ids)
        if partner is not None:
            model.set_submodule(partner, TrainedOutputs(model.get_submodule(partner), ids, tied=trained))
        model.set_submodule(name, trained)


def rows_of(model: nn.Module) -> dict[str, TrainedTokens | TrainedOutputs]:
    """Every table with trained rows of its own, by the name it has in the base."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TrainedTokens | TrainedOutputs) and ROWS in module._parameters
    }


def parts_of(output: nn.Module | None) -> tuple[nn.Module | None, Tensor | None, Tensor | None]:
    """An output head as its frozen table, and the ids (T,) and rows (T, D) that are trained; none of a plain head."""
    if isinstance(output, TrainedOutputs):
        return output.base, output.ids_T, output.rows
    return output, None, None


def token_indices(model: PreTrainedModel) -> list[int] | dict[str, list[int]]:
    """For ``adapter_config.json``: the ids alone where their table is the input embedding; else by table."""
    tables = rows_of(model)
    found = {name: list(table.ids) for name, table in tables.items()}
    only_embedding = [table is model.get_input_embeddings() for table in tables.values()] == [True]
    return next(iter(found.values())) if only_embedding else found


def named_rows(indices: Any, module: str) -> list[int]:
    """The ids that an ``adapter_config.json`` gives for a table: PEFT's one list is for the input embedding."""
    if isinstance(indices, dict):
        indices = next((ids for name, ids in indices.items() if f".{module}".endswith(f".{name}")), [])
    return indices if isinstance(indices, list) else []


def rows_agree(indices: Any, tables: dict[str, TokenRows]) -> bool:
    """Whether a file holds rows exactly where its ``adapter_config.json`` speaks of some, and each has its id."""
    return bool(indices) == bool(tables) and all(table.is_whole for table in tables.values())
