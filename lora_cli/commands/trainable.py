"""What a recipe trains in a model: its adapters, its modules in full, and how many parameters that makes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lora_cli.adapters.injection import (
    Target,
    attach,
    find_saved,
    find_targets,
    freeze_base,
    outermost,
    parametrisation,
    quantize,
)
from lora_cli.device import choose_device
from lora_cli.errors import Mistake, RecipeError
from lora_cli.fusion.layers import repeated_layers
from lora_cli.fusion.recompute import refuses
from lora_cli.fusion.skipping import skippable
from lora_cli.hub import ModelFolder
from lora_cli.models import empty_model, head_modules
from lora_cli.recipe import Recipe


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


def plan_model(
    recipe: Recipe, config: PreTrainedConfig, folder: ModelFolder | None, *, remote_code: bool = False
) -> ModelPlan:
    """Find what a recipe trains in a model, on the meta device."""
    attention = recipe.model.attn_implementation
    skeleton = empty_model(config, recipe.task, attn_implementation=attention, remote_code=remote_code)
    targets, saved = prepare(skeleton, recipe)
    return ModelPlan(config, folder, skeleton, targets, saved, count(skeleton))


def prepare(model: PreTrainedModel, recipe: Recipe) -> tuple[list[Target], list[str]]:
    """Make a base trainable as the recipe says, in place; the same for the skeleton and the real model."""
    if recipe.method == "full":
        model.requires_grad_(True)
        return [], []
    saved = _in_full(model, recipe)
    targets = find_targets(model, recipe.lora, saved) if recipe.method == "lora" else []
    attach(model, targets, parametrisation(recipe.lora))
    freeze_base(model, saved)
    return targets, saved


def quantize_base(model: PreTrainedModel, recipe: Recipe) -> bool:
    """Pack a base's linear layers as the recipe says, in place, before it is prepared; whether it says so.

    The skeleton that parameters are counted in stays dense: four bits are still one parameter each.
    """
    if recipe.model.quantization == "none":
        return False
    quantize(model, _in_full(model, recipe), recipe.model.quantization)
    return True


def _in_full(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    saved = find_saved(model, recipe.lora.modules_to_save)
    return outermost([*head_modules(model, recipe.task), *saved])


def check_trainable(recipe: Recipe, model: ModelPlan) -> None:
    """Refuse what would fail, or be lost, only after the weights are loaded."""
    mistakes = []
    if getattr(model.config, "quantization_config", None) is not None:
        message = "is stored quantized, and only bases that this tool quantizes itself can be trained on"
        cure = "name the base that it was made from, with model.quantization: nf4 or int8"
        mistakes.append(Mistake(("model", "path"), message, cure))
    if reason := refuses(
        model.skeleton, recipe.training.gradient_checkpointing, choose_device(recipe.training.use_cpu)
    ):
        cure = "write true" if model.skeleton.supports_gradient_checkpointing else "remove it"
        mistakes.append(Mistake(("training", "gradient_checkpointing"), reason, cure))
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
    if mistakes:
        raise RecipeError(mistakes)


def count(model: nn.Module) -> Counted:
    """Parameters, each shared one once."""
    parameters = list(model.parameters())
    return Counted(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad))
