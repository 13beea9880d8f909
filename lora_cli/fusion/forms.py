"""Faster forms of a model's own modules, each adopted only where it is proven on that very module.

While the model runs its own code on a few tokens, every module that looks like one of the forms below is
compared, on the inputs it gets there, with its form; where both agree, the form takes the forward's place.
An unknown architecture thus costs speed, never correctness.

Shape suffixes: N tokens, H heads, D head size; `...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.layer import has_hooks, projection_of
from lora_cli.fusion.attention import ROWS_KEYWORD
from lora_cli.fusion.sharding import gathered
from lora_cli.ops.attention import attend_rows
from lora_cli.ops.elementwise import rms_norm, rotate
from lora_cli.ops.gated import ACTIVATIONS, gated_low_rank
from lora_cli.ops.kernels import Kernels
from lora_cli.ops.low_rank import Projection, low_rank_linear
from lora_cli.ops.sight import Sight

Forward = partial[Any]
# How far a form may be from the module's own code, as a share of its output's size: a rounding or two.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def forms_of(module: nn.Module, sights: dict[Any, Any], kernels: Kernels) -> Iterator[Forward]:
    """The forms that this module may have, by its looks; ``sights`` holds what its attention was asked for."""
    if has_hooks(module):
        return
    looks = _looks_of(module)
    if looks == "norm":
        yield from _norm_forms(module, kernels)
    elif looks == "gated":
        yield from _gated_forms(module, kernels)
    elif looks == "attention" and module in sights:
        yield from _attention_forms(module, sights[module], kernels)


def _looks_of(module: nn.Module) -> str | None:
    if type(module).__name__.endswith("RMSNorm"):
        return "norm"
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return "gated"
    return "attention" if all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")) else None


def may_have_forms(model: nn.Module) -> bool:
    """False where it is known without a weight that no module will have one."""
    return any(_looks_of(module) is not None for module in model.modules())


def _projections(module: nn.Module, *names: str) -> list[Projection] | None:
    """All of them, or None where one is more than arithmetic."""
    found = [projection for name in names if (projection := projection_of(getattr(module, name))) is not None]
    return found if len(found) == len(names) else None


def _norm_forms(module: nn.Module, kernels: Kernels) -> Iterator[Forward]:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(weight, nn.Parameter) and weight.ndim == 1 and not weight.requires_grad and isinstance(eps, float):
        for offset in (0.0, 1.0):
            yield partial(_norm, module, eps, offset, kernels)


def _norm(module: Any, eps: float, offset: float, kernels: Kernels, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, eps, offset, kernels=kernels)


def _gated_forms(module: Any, kernels: Kernels) -> Iterator[Forward]:
    activation = _activation_name(module.act_fn)
    if activation is not None and _projections(module, "gate_proj", "up_proj", "down_proj"):
        yield partial(_gated, module, activation, kernels)


def _activation_name(act: Callable[[Tensor], Tensor]) -> str | None:
    points = torch.linspace(-6, 6, 49)
    equal = (name for name, (known, _) in ACTIVATIONS.items() if torch.allclose(act(points), known(points), atol=1e-6))
    return next(equal, None)


def _gated(module: nn.Module, activation: str, kernels: Kernels, x: Tensor) -> Tensor:
    projections = _projections(module, "gate_proj", "up_proj", "down_proj")
    assert projections is not None
    gate, up = low_rank_linear(x, projections[:2])
    return gated_low_rank(gate, up, activation, projections[2], kernels=kernels)


def _attention_forms(module: nn.Module, sight: Sight, kernels: Kernels) -> Iterator[Forward]:
    known = isinstance(getattr(module, "head_dim", None), int) and hasattr(module, "attention_dropout")
    if known and _projections(module, "q_proj", "k_proj", "v_proj", "o_proj"):
        yield partial(_attention, module, sight, kernels)


def _attention(
    module: Any,
    sight: Sight,
    kernels: Kernels,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Llama's attention and its kin, with a norm on queries and keys where the model has one."""
    projections = _projections(module, "q_proj", "k_proj", "v_proj", "o_proj")
    assert projections is not None and attention_mask is None and past_key_values is None
    cos_ND, sin_ND = (table[0] for table in position_embeddings)
    query, key, value = low_rank_linear(hidden_states[0], projections[:3])
    query_NHD = rotate(_heads(query, module, "q_norm"), cos_ND, sin_ND, kernels=kernels)
    key_NHD = rotate(_heads(key, module, "k_norm"), cos_ND, sin_ND, kernels=kernels)
    value_NHD = value.unflatten(-1, (-1, module.head_dim))
    dropout = module.attention_dropout if module.training else 0.0
    out_NHD = attend_rows(query_NHD, key_NHD, value_NHD, kwargs[ROWS_KEYWORD], sight, dropout)
    return low_rank_linear(out_NHD.flatten(1), projections[3:])[0][None], None


def _heads(x: Tensor, module: nn.Module, norm_name: str) -> Tensor:
    """(N, H * D) -> (N, H, D); Qwen3 norms each head, OLMo 2 all of them together."""
    norm, size = getattr(module, norm_name, None), module.head_dim
    if norm is None:
        return x.unflatten(-1, (-1, size))
    if norm.weight.numel() == size:
        return norm(x.unflatten(-1, (-1, size)))
    return norm(x).unflatten(-1, (-1, size))


class Calls:
    """Notes the modules' calls during one forward pass: what each was given and what it gave."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.notes: dict[nn.Module, tuple[Any, Any, Any]] = {}
        clean = [module for module in model.modules() if not has_hooks(module)]
        self._handles = [module.register_forward_hook(self._note, with_kwargs=True) for module in clean]

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.notes[module] = (args, kwargs, output)

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    def proven_forms(self, sights: dict[Any, Any], choices: Sequence[Kernels]) -> dict[nn.Module, Forward]:
        """The first form of each module that gives what the module gave, by the first of these kernels."""
        proven = {}
        for module, (args, kwargs, output) in self.notes.items():
            with gathered(self._model, module):
                possible = (form for kernels in choices for form in forms_of(module, sights, kernels))
                form = next((form for form in possible if _agrees(form, args, kwargs, output)), None)
            if form is not None:
                proven[module] = form
        return proven


def name_of(form: Forward) -> str:
    """norm, gated or attention."""
    return str(form.func.__name__).lstrip("_")


def kernels_of(form: Forward) -> Kernels:
    return next(argument for argument in form.args if isinstance(argument, Kernels))


def adopt(proven: dict[nn.Module, Forward]) -> dict[str, int]:
    """Put proven forms in place; how many of each kind."""
    counts: dict[str, int] = {}
    for module, form in proven.items():
        module.forward = form
        counts[name_of(form)] = counts.get(name_of(form), 0) + 1
    return counts


def abandon(proven: dict[nn.Module, Forward]) -> None:
    """Give the modules their own code back."""
    for module in proven:
        del module.forward


def _agrees(form: Forward, args: Any, kwargs: Any, output: Any) -> bool:
    try:
        other = form(*args, **kwargs)
    except Exception:  # it takes or gives something else, or what makes its kernels raises one of its own
        return False
    if isinstance(output, tuple):
        if len(output) != 2 or not isinstance(output[0], Tensor):
            return False
        output, other = output[0], other[0]
    return close(other, output, TOLERANCES[output.dtype])


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """||found - expected|| <= tolerance ||expected||, and both are alike in kind."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found.double() - expected.double()).norm() <= tolerance * expected.double().norm())
