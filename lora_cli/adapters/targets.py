"""Find the modules that a recipe means: those to adapt, and those to train in full."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_cli.adapters.embedding import is_plain_table
from lora_cli.adapters.experts import STACKED, stack_shape
from lora_cli.adapters.layer import (
    LINEAR_TYPES,
    features,
    scaling_of,
)
from lora_cli.adapters.patterns import ending, invalid_reason, is_wild, layer_of, matches, nearest
from lora_cli.errors import KeyPath, Mistake, RecipeError
from lora_cli.recipe import LoraSection


@dataclass(frozen=True)
class Target:
    """One module to adapt: its name, its rank and the scale of its update."""

    name: str
    r: int
    scaling: float
    in_features: int
    out_features: int
    experts: int = 1  # more: the module is a stacked parameter
    is_embedding: bool = False  # from ids (in_features of them) to hidden states

    @property
    def numel(self) -> int:
        return self.experts * self.r * (self.in_features + self.out_features)


def linear_targets(targets: list[Target]) -> list[Target]:
    """Those with a matrix of their own: what LoftQ quantizes."""
    return [target for target in targets if not target.is_embedding]


def linear_modules(model: PreTrainedModel, *, outside: list[str] | None = None) -> dict[str, nn.Module]:
    """Linear layers that may be adapted: not the output head, not below ``outside``."""
    head = model.get_output_embeddings()
    heads = (head, getattr(head, "base", None))  # where some of its rows are trained, a head has another one inside
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LINEAR_TYPES)
        and not any(module is one for one in heads)
        and not is_below(name, outside or [])
    }


def is_below(name: str, roots: list[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def outermost(names: list[str]) -> list[str]:
    """Each once, without those that are inside another one."""
    distinct = list(dict.fromkeys(names))
    return [name for name in distinct if not is_below(name, [other for other in distinct if other != name])]


def find_targets(model: PreTrainedModel, lora: LoraSection, saved: list[str]) -> list[Target]:
    """The modules to adapt, in the model's order.

    ``saved`` modules are trained in full and get no adapter. Raises ``RecipeError`` for a pattern that
    matches nothing, or something that cannot be adapted.
    """
    return _Finder(model, lora, saved).find()


class _Finder:
    """Collects every mistake of the lora section before raising them at once."""

    def __init__(self, model: PreTrainedModel, lora: LoraSection, saved: list[str]) -> None:
        self.model = model
        self.lora = lora
        self.saved = saved
        self.linear = linear_modules(model, outside=saved)
        self.candidates = self.linear | _named_embedding(model, lora, saved)
        self.stacks = stacked_parameters(model)
        self.oversized: dict[KeyPath, list[str]] = {}
        self.mistakes: list[Mistake] = []

    def find(self) -> list[Target]:
        """The targets in the model's order, or every mistake at once."""
        chosen, stacked = self._targeted(), self._stacked()
        left = self._in_layers() - self._excluded()
        chosen, stacked = chosen & left, stacked & left
        targets = [self._target(name) for name in self.candidates if name in chosen]
        targets += [self._stack(name) for name in self.stacks if name in stacked]
        self._check_embedding(targets)
        self._check_ranks()
        self._check_patterns("rank_pattern", self.lora.rank_pattern, chosen)
        self._check_patterns("alpha_pattern", self.lora.alpha_pattern, chosen)
        if not targets and not self.mistakes:
            self._wrong(("lora",), "leaves no module to adapt: everything targeted is excluded")
        if self.mistakes:
            raise RecipeError(self.mistakes)
        return targets

    def _wrong(self, path: KeyPath, message: str, help: str | None = None) -> None:
        self.mistakes.append(Mistake(path, message, help))

    def _targeted(self) -> set[str]:
        patterns = self.lora.target_modules
        if patterns == "all-linear":
            return set(self.linear)
        path = ("lora", "target_modules")
        if isinstance(patterns, str):
            return self._matched(path, patterns)
        return set().union(*(self._matched((*path, index), pattern) for index, pattern in enumerate(patterns)))

    def _excluded(self) -> set[str]:
        path = ("lora", "exclude_modules")
        patterns = self.lora.exclude_modules
        stacked = [name for name in self.stacks if self.lora.target_parameters]
        return set().union(*(self._matched((*path, index), pattern, stacked) for index, pattern in enumerate(patterns)))

    def _matched(self, path: KeyPath, pattern: str, others: Iterable[str] = ()) -> set[str]:
        if reason := invalid_reason(pattern):
            self._wrong(path, reason)
            return set()
        found = {name for name in (*self.candidates, *others) if matches(name, pattern)}
        if not found:
            self._wrong(path, *self._no_match(pattern))
        return found

    def _no_match(self, pattern: str) -> tuple[str, str]:
        """Why a pattern chose nothing, and what it could have been."""
        endings = sorted({ending(name) for name in self.candidates})
        have = f"this model has: {', '.join(endings)}"
        for name, module in self.model.named_modules():
            if matches(name, pattern):
                if is_below(name, self.saved):
                    return f"'{pattern}' is {name}, which is trained in full: it needs no adapter", have
                if module is self.model.get_input_embeddings():
                    return f"'{pattern}' is {name}, which no pattern takes along", f"name it outright: {ending(name)}"
                kind = "the output head" if isinstance(module, LINEAR_TYPES) else f"of type {type(module).__name__}"
                return f"'{pattern}' is {name}, {kind}: adapters go on linear layers inside the model", have
        close = nearest(pattern, self.candidates)
        return f"no layer is named '{pattern}'", f"did you mean {close}? {have}" if close else have

    def _in_layers(self) -> set[str]:
        layers = self.lora.layers_to_transform
        names = {*self.candidates, *self.stacks}
        if layers is None:
            return names
        for name in self.candidates.keys() - self.linear.keys():
            message = f"cannot be combined with an adapter on {name}, which is in no layer"
            self._wrong(("lora", "layers_to_transform"), message, "remove one of them")
        known = {layer for name in names if (layer := layer_of(name)) is not None}
        for index, layer in enumerate(layers):
            if layer not in known:
                last = max(known, default=-1)
                message = (
                    f"has no layer {layer}: this model's layers are 0 to {last}"
                    if known
                    else ("cannot be used: this model's modules are not numbered")
                )
                self._wrong(("lora", "layers_to_transform", index), message)
        return {name for name in names if layer_of(name) in layers}

    def _check_patterns(self, key: str, table: dict[str, int] | dict[str, float], chosen: set[str]) -> None:
        for pattern in table:
            if reason := invalid_reason(pattern):
                self._wrong(("lora", key, pattern), reason)
            elif not any(matches(name, pattern) for name in chosen):
                close = nearest(pattern, chosen)
                help = f"did you mean {close}?" if close else None
                self._wrong(("lora", key, pattern), "matches no adapted module", help)

    def _target(self, name: str) -> Target:
        module = self.candidates[name]
        is_embedding = isinstance(module, nn.Embedding)
        in_features, out_features = tuple(module.weight.shape) if is_embedding else features(module)
        r = self._patterned("rank_pattern", name, self.lora.r)
        if r > min(in_features, out_features):
            size = f"{out_features} x {in_features}"
            key: KeyPath = ("lora", "rank_pattern") if r != self.lora.r else ("lora", "r")
            self.oversized.setdefault(key, []).append(f"{r} is more than the rank of {name} ({size})")
        alpha = self._patterned("alpha_pattern", name, self.lora.lora_alpha)
        scaling = scaling_of(alpha, r, self.lora.use_rslora)
        return Target(name, r, scaling, in_features, out_features, is_embedding=is_embedding)

    def _check_embedding(self, targets: list[Target]) -> None:
        """What the update of an embedding cannot be combined with."""
        for target in targets:
            if not target.is_embedding:
                continue
            partner = tied_partner(self.model, target.name)
            if partner:
                message = f"names {target.name}, which shares its weight with {partner}: an update would untie them"
                whole = f"lora.modules_to_save: [{ending(target.name)}]"
                cure = f"use {whole} or lora.trainable_token_indices: both keep them tied"
                self._wrong(("lora", "target_modules"), message, cure)
            if not is_plain_table(self.candidates[target.name]):
                kind = type(self.candidates[target.name]).__name__
                self._wrong(("lora", "target_modules"), f"names {target.name}, a {kind}, and no plain table")
            if self.lora.use_dora:
                message = f"cannot be combined with an adapter on {target.name}: it trains the rows of linear layers"
                self._wrong(("lora", "use_dora"), message, "remove one of them")

    def _stacked(self) -> set[str]:
        """The stacked parameters that `target_parameters` names."""
        found = set()
        for index, pattern in enumerate(self.lora.target_parameters):
            named = {name for name in self.stacks if matches(name, pattern)}
            path = ("lora", "target_parameters", index)
            if not named:
                endings = sorted({".".join(name.split(".")[-2:]) for name in self.stacks})
                have = f"this model has: {', '.join(endings)}" if endings else "this model has no stacked experts"
                self._wrong(path, f"no stacked parameter is named '{pattern}'", have)
            elif whole := [name for name in self.stacks if name in named and is_below(name, self.saved)]:
                message = f"'{pattern}' is {whole[0]}, which lora.modules_to_save trains in full: it needs no adapter"
                self._wrong(path, message, "remove it from one of them")
            found |= named
        return found

    def _stack(self, name: str) -> Target:
        experts, in_features, out_features = self.stacks[name]
        scaling = scaling_of(self.lora.lora_alpha, self.lora.r, self.lora.use_rslora)
        return Target(name, self.lora.r, scaling, in_features, out_features, experts)

    def _check_ranks(self) -> None:
        """One mistake a key: a rank that is too large for one layer is so for all of its kind."""
        for key, messages in self.oversized.items():
            more = f" and {len(messages) - 1} more" if len(messages) > 1 else ""
            self._wrong(key, messages[0] + more)

    def _patterned(self, key: str, name: str, default):  # type: ignore[no-untyped-def]
        """The first entry of a pattern table that names this module, else the default."""
        table = getattr(self.lora, key)
        usable = (pattern for pattern in table if invalid_reason(pattern) is None)
        return next((table[pattern] for pattern in usable if matches(name, pattern)), default)


def _named_embedding(model: PreTrainedModel, lora: LoraSection, saved: list[str]) -> dict[str, Any]:
    """The input embedding where `target_modules` names it outright: no glob takes it along unasked."""
    patterns = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    plain = [pattern for pattern in patterns if not is_wild(pattern)]
    table = model.get_input_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if module is table and not is_below(name, saved) and any(matches(name, pattern) for pattern in plain)
    }


def find_saved(model: nn.Module, patterns: list[str]) -> list[str]:
    """The modules that `modules_to_save` names; of a tied pair of embedding and output head always both.

    Raises ``RecipeError`` for a name that matches nothing or holds no parameters, and for one that shares its
    weight with another module: training it would untie the two.
    """
    mistakes, saved = [], []
    path = ("lora", "modules_to_save")
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        if reason := invalid_reason(pattern):
            mistakes.append(Mistake(path, reason))
            continue
        named = outermost([name for name in modules if matches(name, pattern)])
        found = [name for name in named if any(True for _ in modules[name].parameters())]
        if not named:
            endings = sorted({ending(name) for name in modules if not ending(name).isdigit()})
            close = nearest(pattern, modules)
            help = f"did you mean {close}? " if close else ""
            mistakes.append(
                Mistake(path, f"no module is named '{pattern}'", f"{help}this model has: {', '.join(endings)}")
            )
        elif not found:
            mistakes.append(Mistake(path, f"'{pattern}' is {named[0]}, which holds no parameters to train"))
        for name in found:
            partner = tied_partner(model, name)
            if partner and is_word_pair(model, name, partner):
                found = [*found, partner]
            elif partner:
                mistakes.append(Mistake(path, f"{name} shares its weight with {partner}: training it would untie them"))
        saved += found
    if mistakes:
        raise RecipeError(mistakes)
    return outermost(saved)


def is_word_pair(model: nn.Module, *names: str) -> bool:
    """Whether these are the input embedding and the output head, which stay tied when both are trained."""
    if not isinstance(model, PreTrainedModel):
        return False
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return all(any(model.get_submodule(name) is table for table in tables) for name in names)


def tied_partner(model: nn.Module, name: str) -> str | None:
    """A module outside ``name`` that shares a parameter with it."""
    own = {id(parameter) for parameter in model.get_submodule(name).parameters()}
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not is_below(other, [name]):
            return other.rsplit(".", 1)[0]
    return None


def stacked_parameters(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """(E, I, O) of every stacked parameter that can be adapted, by name."""
    return {
        f"{name}.{parameter}": stack_shape(module, parameter)
        for name, module in model.named_modules()
        for parameter in STACKED
        if getattr(getattr(module, parameter, None), "ndim", 0) == 3 and isinstance(getattr(module, parameter), Tensor)
    }
