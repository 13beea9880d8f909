"""Put adapters on the modules that were found, pack and freeze the rest, and take them off again."""

from __future__ import annotations

from collections import Counter

from torch import nn
from transformers import PreTrainedModel

from lora_cli.adapters.embedding import LoRAEmbedding
from lora_cli.adapters.experts import LoRAExperts, LoRAStack
from lora_cli.adapters.full import train_in_full
from lora_cli.adapters.initialisation import kind_of
from lora_cli.adapters.layer import (
    DENSE_TYPES,
    PLAIN,
    LoRALinear,
    Parametrisation,
    has_hooks,
)
from lora_cli.adapters.quantized import QuantizedLinear, quantized
from lora_cli.adapters.targets import Target, linear_modules, outermost
from lora_cli.recipe import LoraSection

Adapted = LoRALinear | LoRAStack | LoRAEmbedding


def packable_modules(model: PreTrainedModel, saved: list[str]) -> list[str]:
    """Linear layers that a quantized base stores packed: all that are frozen, plain, and not the output head.

    A weight that two modules share stays as it is: the other one may be no linear layer.
    """
    parameters = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    shared = {number for number, count in Counter(parameters).items() if count > 1}
    return [
        name
        for name, module in linear_modules(model, outside=saved).items()
        if type(module) in DENSE_TYPES and not has_hooks(module) and id(module.weight) not in shared
    ]


def quantize(model: nn.Module, names: list[str], kind: str) -> None:
    """Pack linear layers, in place and one by one: no more than one of them is there in both forms.

    Always on the device where the weights are read, the CPU: everywhere the same bits.
    """
    for name in names:
        model.set_submodule(name, quantized(model.get_submodule(name), kind))
    let_go_of_files(model)


def let_go_of_files(model: nn.Module) -> None:
    """Weights of the type they are stored in are parts of a mapped file, and one of them holds all of it in memory."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, of a packed one as (O, I)."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    packed = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    return shapes | {f"{name}.weight": (module.out_features, module.in_features) for name, module in packed.items()}


def parametrisation(lora: LoraSection) -> Parametrisation:
    """What a recipe makes of each adapter, beside its rank and scale."""
    return Parametrisation(lora.lora_dropout, lora.use_dora, kind_of(lora.init_lora_weights).has_start)


def attach(model: nn.Module, targets: list[Target], form: Parametrisation = PLAIN) -> dict[str, Adapted]:
    """Put an adapter on every target, in place. The adapters' A still hold no values."""
    layers: dict[str, Adapted] = {}
    for target in targets:
        parent_name, _, child = target.name.rpartition(".")
        if target.experts > 1:
            layers[target.name] = _wrapped(model, parent_name).stack(child, target.r, target.scaling)
            continue
        parent = model.get_submodule(parent_name)
        base = getattr(parent, child)
        layer: Adapted = (
            LoRAEmbedding(base, target.r, target.scaling)
            if isinstance(base, nn.Embedding)
            else LoRALinear(base, target.r, target.scaling, form)
        )
        setattr(parent, child, layer)
        layers[target.name] = layer
    return layers


def _wrapped(model: nn.Module, name: str) -> LoRAExperts:
    """The module of that name with room for updates, put there if it is not yet."""
    module = model.get_submodule(name)
    if isinstance(module, LoRAExperts):
        return module
    parent_name, _, child = name.rpartition(".")
    experts = LoRAExperts(module)
    setattr(model.get_submodule(parent_name), child, experts)
    return experts


def freeze_base(model: nn.Module, saved: list[str]) -> None:
    """Leave only adapters and ``saved`` modules trainable; trained weights are float32."""
    dtypes = {id(parameter): parameter.dtype for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in adapters_of(model).values():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
    for name in outermost(saved):  # a module inside another one must not cast its outputs back
        train_in_full(model.get_submodule(name), dtypes)


def adapters_of(model: nn.Module) -> dict[str, Adapted]:
    """Every adapted module or stacked parameter of a model, by the name it has in the base."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trained parameter, by the name the base model gives it."""
    return {base_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def tied_copies(model: nn.Module) -> dict[str, str]:
    """Names under which a trained parameter is known besides its own, and that: PEFT saves a tied pair twice.

    None where the whole model is trained: it is saved as a plain model folder.
    """
    if all(p.requires_grad for p in model.parameters()):
        return {}
    own, copies = {id(p): name for name, p in trained_parameters(model).items()}, {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad and own[id(p)] != base_name(name):
            copies[base_name(name)] = own[id(p)]
    return copies


def base_name(name: str) -> str:
    """A parameter's name as the base model has it: `q_proj.base.weight` is `q_proj.weight`."""
    head, _, last = name.rpartition(".")
    return f"{head.removesuffix('.base')}.{last}" if head else last
