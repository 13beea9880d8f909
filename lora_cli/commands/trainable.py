"""What a recipe trains in a model: its adapters, its modules in full, and how many parameters that makes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.adapters.adapter import Adapter, mismatches, single_updates, targets_of
from lora_cli.adapters.backbone import is_backbone, pack_as_stored
from lora_cli.adapters.files import read_adapter
from lora_cli.adapters.injection import (
    adapters_of,
    attach,
    dense_shapes,
    freeze_base,
    packable_modules,
    parametrisation,
    quantize,
)
from lora_cli.adapters.layer import Parametrisation
from lora_cli.adapters.loftq import KINDS
from lora_cli.adapters.spectrum import MOST_LOST, rounding_loss
from lora_cli.adapters.targets import Target, find_saved, find_targets, linear_targets, outermost, tied_partner
from lora_cli.adapters.tokens import attach_rows, find_rows, make_room, make_room_for, rows_of
from lora_cli.commands.fitted import adapted_tables, copied_rows, copies_in_full
from lora_cli.device import choose_device
from lora_cli.errors import Mistake, RecipeError, UsageError
from lora_cli.fusion.compilation import why_not_whole_layers
from lora_cli.fusion.forms import may_have_forms
from lora_cli.fusion.layers import repeated_layers
from lora_cli.fusion.recompute import refuses
from lora_cli.fusion.skipping import skippable
from lora_cli.hub import ModelFolder
from lora_cli.models import empty_model, grown_vocabulary, head_modules, sees_ahead
from lora_cli.ops.kernels import why_not_compiled
from lora_cli.ops.liger import why_not_here
from lora_cli.recipe import Recipe
from lora_cli.recipe.rules.facts import STARTS_FROM_WEIGHTS, is_quantized


@dataclass(frozen=True)
class Counted:
    """Parameters of the whole model, and those that are trained."""

    total: int
    trainable: int

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


@dataclass(frozen=True)
class ModelPlan:
    """The model as it will be: its modules on the meta device, with adapters where they will be."""

    config: PreTrainedConfig
    folder: ModelFolder | None  # none for a random model
    skeleton: PreTrainedModel
    targets: list[Target]
    saved: list[str]  # modules trained in full
    counted: Counted
    new_ids: list[int] = field(default_factory=list)  # of tokens that the recipe adds

    @property
    def vocabulary(self) -> int | None:
        """How many words the model has with the new ones; None where it had room for them."""
        return grown_vocabulary(self.skeleton, self.config)

    @property
    def rows(self) -> dict[str, list[int]]:
        """The ids of single trained rows, by the table they are in."""
        return {name: list(table.ids) for name, table in rows_of(self.skeleton).items()}

    def with_trained(self, model: nn.Module) -> ModelPlan:
        """The plan with the number of parameters that a model really trains: EVA hands out ranks by what it finds."""
        trainable = count(model).trainable
        total = self.counted.total - self.counted.trainable + trainable
        return replace(self, counted=Counted(total, trainable))

    @property
    def uses_dora(self) -> bool:
        return any(layer.lora_magnitude_vector is not None for layer in adapters_of(self.skeleton).values())


def plan_model(
    recipe: Recipe,
    config: PreTrainedConfig,
    folder: ModelFolder | None,
    new_ids: list[int] | None = None,
    *,
    remote_code: bool = False,
) -> ModelPlan:
    """Find what a recipe trains in a model, on the meta device. ``new_ids`` are those of `dataset.new_tokens`."""
    attention = recipe.model.attn_implementation
    skeleton = empty_model(config, recipe.task, attn_implementation=attention, remote_code=remote_code)
    targets, saved = prepare(skeleton, recipe, new_ids)
    return ModelPlan(config, folder, skeleton, targets, saved, count(skeleton), new_ids or [])


def prepare(model: PreTrainedModel, recipe: Recipe, new_ids: list[int] | None = None) -> tuple[list[Target], list[str]]:
    """Make a base trainable as the recipe says, in place; the same for the skeleton and the real model."""
    if recipe.method == "full":
        model.requires_grad_(True)
        return [], []
    if recipe.lora.init_from is not None:
        return _prepare_as(model, recipe, _origin(recipe.lora.init_from))
    saved = _in_full(model, recipe)
    targets = find_targets(model, recipe.lora, saved) if recipe.method == "lora" else []
    make_room(model, new_ids or [])
    adapted = [target.name for target in targets]
    rows = find_rows(model, recipe.lora.trainable_token_indices, saved, new_ids, adapted)
    attach(model, targets, parametrisation(recipe.lora))
    freeze_base(model, saved)
    attach_rows(model, rows)
    return targets, saved


def _prepare_as(model: PreTrainedModel, recipe: Recipe, adapter: Adapter) -> tuple[list[Target], list[str]]:
    """The same for a run that goes on from an adapter: its modules, ranks, scales and kind are taken over."""
    make_room_for(model, adapter.tokens)
    _check_fits(model, recipe, adapter)
    saved = _in_full(model, recipe)
    targets = targets_of(adapter)
    attach(model, targets, Parametrisation(recipe.lora.lora_dropout, adapter.use_dora))
    freeze_base(model, saved)
    attach_rows(model, {name: table.ids for name, table in adapter.tokens.items()})
    return targets, saved


def _check_fits(model: PreTrainedModel, recipe: Recipe, adapter: Adapter) -> None:
    path = ("lora", "init_from")
    if adapter.task != recipe.task:
        raise RecipeError([Mistake(path, f"is an adapter for {adapter.task}, and this run's task is {recipe.task}")])
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    if wrong := mismatches(adapter, dense_shapes(model), transposed):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        message = f"does not fit this model: {wrong[0]}{more}"
        raise RecipeError([Mistake(path, message, "name the adapter's own base in model.path")])
    head = model.get_output_embeddings()
    if outside := [name for name, module in model.named_modules() if module is head and name in adapter.updates]:
        raise RecipeError([Mistake(path, f"adapts the output head ({outside[0]}), which is not trained so here")])
    wanted = recipe.training.save_dtype
    if wanted in ("bfloat16", "float16"):
        lost = rounding_loss(single_updates(adapter.updates), getattr(torch, wanted))
        if lost > MOST_LOST:
            message = f"{wanted} would change the updates in lora.init_from by {lost:.0%} of their norm"
            raise RecipeError([Mistake(("training", "save_dtype"), message, "use auto or float32")])
    copies = [*copies_in_full(model, adapter), *copied_rows(model, adapter), *adapted_tables(adapter)]
    tied = [(name, partner) for name in copies if (partner := tied_partner(model, name))]
    if tied:
        name, partner = tied[0]
        raise RecipeError([Mistake(path, f"holds a copy of {name}, which shares its weight with {partner}")])


def quantize_base(model: PreTrainedModel, recipe: Recipe, base: Path | None) -> bool:
    """Pack a base's linear layers, in place, before it is prepared: as the recipe says, or as they lie in its folder.

    Whether there are any. The skeleton that parameters are counted in stays dense: four bits are still one parameter
    each. A model on the meta device may be that of a backbone that is still to be made.
    """
    if base is not None and is_backbone(base):
        pack_as_stored(model, base, _in_full(model, recipe))
    elif recipe.model.quantization != "none":
        quantize(model, packable_modules(model, _in_full(model, recipe)), recipe.model.quantization)
    elif recipe.lora.is_loftq:
        targets = find_targets(model, recipe.lora, _in_full(model, recipe))
        quantize(
            model,
            [target.name for target in linear_targets(targets)],
            KINDS[recipe.lora.loftq_config.loftq_bits],
        )
    else:
        return False
    return True


def _in_full(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    """The modules that are trained in full."""
    origin = recipe.lora.init_from
    saved = find_saved(model, recipe.lora.modules_to_save) if origin is None else _origin(origin).saved_modules
    return outermost([*head_modules(model, recipe.task), *saved])


def _origin(folder: str) -> Adapter:
    """The adapter that a run goes on from. Raises ``RecipeError`` where it is none that can be read."""
    try:
        return read_adapter(Path(folder).expanduser())
    except UsageError as error:
        raise RecipeError([Mistake(("lora", "init_from"), f"cannot be used: {error.message}", error.help)]) from error


def check_trainable(recipe: Recipe, model: ModelPlan) -> None:
    """Refuse what would fail, or be lost, only after the weights are loaded."""
    mistakes = []
    if mistake := _wrongly_quantized(recipe, model):
        mistakes.append(mistake)
    if recipe.lora.is_loftq and not linear_targets(model.targets):
        message = "loftq quantizes the linear layers that are adapted, and this recipe adapts none"
        mistakes.append(Mistake(("lora", "init_lora_weights"), message, "name some in lora.target_modules"))
    if reason := refuses(
        model.skeleton, recipe.training.gradient_checkpointing, choose_device(recipe.training.use_cpu)
    ):
        cure = "write true" if model.skeleton.supports_gradient_checkpointing else "remove it"
        mistakes.append(Mistake(("training", "gradient_checkpointing"), reason, cure))
    if recipe.training.use_liger_kernel and (refusal := why_not_here(choose_device(recipe.training.use_cpu))):
        mistakes.append(Mistake(("training", "use_liger_kernel"), *refusal))
    if recipe.training.torch_compile and (refusal := _why_not_compiled(recipe, model)):
        mistakes.append(Mistake(("training", "torch_compile"), *refusal))
    if recipe.training.cache_frozen_layers != "none":
        try:
            skippable(model.skeleton)
        except RecipeError as error:
            mistakes += error.mistakes
    if recipe.training.strategy == "fsdp" and not repeated_layers(model.skeleton):
        path = ("training", "strategy")
        message = f"fsdp shards decoder layers, and transformers marks none in {model.config.model_type} models"
        mistakes.append(Mistake(path, message, "use ddp"))
    if model.config.is_encoder_decoder:
        message = f"is an encoder-decoder ({model.config.model_type}), which this tool does not train"
        mistakes.append(Mistake(("model", "path"), message))
    elif recipe.task == "causal_lm" and sees_ahead(model.config):
        message = f"is an encoder ({model.config.model_type}), whose tokens see what they should predict"
        mistakes.append(Mistake(("model", "path"), message, "set task: sequence_classification, or name a decoder"))
    if mistakes:
        raise RecipeError(mistakes)


def _why_not_compiled(recipe: Recipe, model: ModelPlan) -> tuple[str, str] | None:
    """The reason and the cure."""
    if reason := why_not_compiled(choose_device(recipe.training.use_cpu)):
        return f"cannot work here: {reason}", "remove it, or install a C++ compiler"
    if recipe.method != "full" and may_have_forms(model.skeleton):
        return None
    return why_not_whole_layers(
        packed=is_quantized(recipe) or getattr(model.config, "quantization_config", None) is not None,
        on_host=recipe.training.gradient_checkpointing == "offload",
    )


def _wrongly_quantized(recipe: Recipe, model: ModelPlan) -> Mistake | None:
    """A base that is stored quantized: read where this tool has made it so, and never quantized again."""
    if getattr(model.config, "quantization_config", None) is None:
        return None
    if recipe.lora.is_loftq:
        message = "is stored quantized, and init_lora_weights: loftq quantizes the base itself, from its dense weights"
        return Mistake(("model", "path"), message, "name the base that it was made from")
    if model.folder is None or not is_backbone(model.folder.path):
        message = "is stored quantized, and only bases that this tool quantizes itself can be trained on"
        cure = "name the base that it was made from, with model.quantization: nf4 or int8"
        return Mistake(("model", "path"), message, cure)
    kind = str(recipe.lora.init_lora_weights)
    if kind.startswith(STARTS_FROM_WEIGHTS):
        message = f"{kind} begins from the base's own weights, and a base that is stored quantized no longer has them"
        return Mistake(("lora", "init_lora_weights"), message, "use true, gaussian, orthogonal or eva")
    if recipe.method != "lora":
        return Mistake(("model", "path"), f"is stored quantized, and method: {recipe.method} writes a whole model")
    if recipe.model.quantization != "none":
        return Mistake(("model", "quantization"), "has no effect on a base that is stored quantized", "remove it")
    return None


def count(model: nn.Module) -> Counted:
    """Parameters, each shared one once."""
    parameters = list(model.parameters())
    return Counted(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))
