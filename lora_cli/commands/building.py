"""The model of a run, and the fastest way to run it: what all processes build before the first step."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lora_cli.commands.beginning import agree_on_beginning, begin, ranks_of
from lora_cli.commands.plan import Plan
from lora_cli.commands.trainable import prepare, quantize_base
from lora_cli.device import give_back_freed_memory, memory_errors
from lora_cli.distributed import ALONE, World
from lora_cli.errors import UsageError
from lora_cli.fusion.network import Network
from lora_cli.fusion.proof import build_compiled_network, build_network
from lora_cli.fusion.recompute import checkpoint_activations
from lora_cli.fusion.sharding import shard_layers
from lora_cli.models import head_modules, load_model
from lora_cli.ops.kernels import Kernels
from lora_cli.seeds import stream_seed

LOADING_CURE = "use a smaller model, or model.dtype: bfloat16"


def build_model(
    plan: Plan, base: Path, checkpoint: Path | None = None, *, remote_code: bool = False, world: World = ALONE
) -> PreTrainedModel:
    """The base with its weights, adapters attached and initialised, on the device, ready to train.

    Adapters have the ranks of the main process's ``checkpoint``, if there is one to go on from.
    """
    sharded = plan.is_sharded
    with world.together(), memory_errors(LOADING_CURE):
        ranks = ranks_of(checkpoint, plan)
        model = _read_base(plan, base, remote_code)
        if not sharded:
            model.to(plan.device)
    ranks = world.tell(ranks)
    with world.together(), memory_errors(LOADING_CURE):
        begin(model, plan, base, ranks)
    if ranks is None:
        agree_on_beginning(model, world)
    if sharded:
        with memory_errors(LOADING_CURE):
            shard_layers(model, plan.device)
            model.to(plan.device)
    if plan.recipe.training.gradient_checkpointing:
        checkpoint_activations(model, plan.recipe.training.gradient_checkpointing)
    return model


def _read_base(plan: Plan, base: Path, remote_code: bool) -> PreTrainedModel:
    recipe = plan.recipe
    torch.manual_seed(stream_seed(recipe.training.seed, "head"))  # transformers draws what the files do not hold
    model, missing = load_model(
        base,
        plan.model.config,
        recipe.task,
        plan.dtype,
        attn_implementation=recipe.model.attn_implementation,
        remote_code=remote_code,
    )
    _check_missing(missing, plan, base)
    if quantize_base(model, recipe, base):
        give_back_freed_memory()  # the dense weights
    prepare(model, recipe, plan.model.new_ids)
    return model


def choose_network(model: PreTrainedModel, plan: Plan, world: World) -> Network:
    """The fastest way to run the model that is shown to be right on it."""
    training = plan.recipe.training
    build = build_compiled_network if training.torch_compile else build_network
    kernels = Kernels.COMPILED if training.torch_compile else Kernels.PLAIN
    if training.use_liger_kernel:
        kernels = Kernels.LIGER
    sharded = plan.is_sharded
    agreement = nullcontext() if sharded else world.together()  # sharded, who fails is missed by the others at once
    with agreement, memory_errors(LOADING_CURE):
        network = build(model, plan.recipe.task, attention=plan.recipe.model.attn_implementation, kernels=kernels)
    return replace(network, sharded=sharded)


def _check_missing(missing: list[str], plan: Plan, base: Path) -> None:
    """Parameters that the files lack are random: fine in a part that is trained, ruinous in a frozen one."""
    allowed = [*head_modules(plan.model.skeleton, plan.recipe.task), *plan.model.saved]
    frozen = [name for name in missing if not any(name.startswith(f"{module}.") for module in allowed)]
    if frozen:
        modules = sorted({name.rsplit(".", 1)[0] for name in frozen})
        cure = f"set lora.modules_to_save: [{', '.join(modules[:4])}]" if plan.recipe.method != "full" else "use lora"
        raise UsageError(
            f"the weights in {base} lack {', '.join(frozen[:4])}{' and more' if len(frozen) > 4 else ''}: "
            "they would be random",
            f"is this the right model? To train them from scratch, {cure}",
        )
