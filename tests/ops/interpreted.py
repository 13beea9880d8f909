"""A process in which Liger's kernels run on the CPU: Triton's interpreter goes through them line by line.

``python -m tests.ops.interpreted [KIND ...]`` prints, as JSON, how far each is from the formula in whose place it
stands; and tiny models of these kinds, run by them, from the same models by plain formulas.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import cross_entropy, geglu, rms_norm
from torch import Tensor
from triton.runtime import interpreter

from lora_cli.fusion import proof
from lora_cli.ops.gated import ACTIVATIONS
from lora_cli.ops.kernels import Kernels
from lora_cli.ops.liger import KERNELS
from tests.fusion.test_networks import CAUSAL, adapted, loss_and_gradients, rows_of, worst
from tests.ops.formulas import FORMULAS

TYPES = {"float32": torch.float32, "float16": torch.float16}  # the interpreter takes bfloat16 for whole numbers


def let_numbers_be_tensors() -> None:
    """A compiled kernel gets a float as a number of Triton's, with ``.to``; the interpreter hands on Python's."""
    own: Callable[[Any], Any] = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if type(argument) is not float:
            return own(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = converted


def take_functions_of_the_device_s_library() -> None:
    """Two come from a library of the GPU's own, of which the interpreter knows nothing."""
    for module in (cross_entropy, geglu):
        module.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # looked up when it is called: the interpreter puts its own there


def inputs_of(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
    """(formula, what is special, what it is given; made anew each time, as some are written into)."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    for offset in (0.0, 1.0):
        norm = (draw(3, 5, 24, seed=1), draw(24, seed=2), 1e-6, offset)
        rstd = FORMULAS["_rms_norm_forward"](*norm)[1]
        yield "_rms_norm_forward", f"offset {offset:g}", lambda norm=norm: norm
        backward = (draw(3, 5, 24), norm[0], rstd, norm[1], offset)
        yield "_rms_norm_backward", f"offset {offset:g}", lambda backward=backward: backward
    tables = [draw(7, 1, 8, seed=seed).repeat(1, 1, 2) for seed in (1, 2)]
    for direction in (1, -1):
        yield "_rotated_by_halves", f"direction {direction}", lambda d=direction: (draw(7, 3, 16), *tables, d)
    for name in ("silu", "gelu_tanh"):
        act, derivative = ACTIVATIONS[name]
        pair = (draw(5, 24, seed=1), draw(5, 24, seed=2))
        yield "_inner", name, lambda act=act, pair=pair: (*pair, act)
        given = (draw(5, 24), *pair, act, derivative)
        yield "_inner_backward", name, lambda given=given: given
    targets = torch.tensor([0, 49, 7])
    for cap in (None, 2.0):
        yield "_losses_and_gradient", f"cap {cap}", lambda cap=cap: (draw(3, 50).mul_(3), targets, 1.0, cap)


def error(ours: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(ours, other, strict=True))


def results(formula: Callable[..., Any], given: tuple[Any, ...]) -> list[Tensor]:
    """What it returns, and its inputs afterwards: only the loss may write, its gradient over the logits."""
    found = formula(*given)
    return [*(found if isinstance(found, tuple) else (found,)), *(x for x in given if isinstance(x, Tensor))]


def of_formulas() -> dict[str, float]:
    return {
        f"{name}, {what}, {kind}": error(results(KERNELS[name], make()), results(FORMULAS[name], make()))
        for kind, dtype in TYPES.items()
        for name, what, make in inputs_of(dtype)
    }


def of_models(kinds: list[str]) -> dict[str, Any]:
    """Loss and every gradient of tiny models by Liger's kernels, against plain formulas; and what serves what."""
    found = {}
    for kind in kinds:
        networks = [
            proof.build_network(adapted(kind, "causal_lm", CAUSAL[kind][0]), "causal_lm", kernels=kernels)
            for kernels in (Kernels.LIGER, Kernels.PLAIN)
        ]
        ours, plain = (loss_and_gradients(network, "causal_lm", rows_of("causal_lm")) for network in networks)
        head = networks[0].head
        found[kind] = {
            "error": worst(ours, plain),
            "forms": sorted(networks[0].forms),
            "notes": list(networks[0].notes),
            "loss": None if head is None else str(head.kernels),
        }
    return found


if __name__ == "__main__":
    let_numbers_be_tensors()
    take_functions_of_the_device_s_library()
    proof.why_not_compiled = lambda device: "not tried"
    print(json.dumps({"formulas": of_formulas(), "models": of_models(sys.argv[1:])}))  # noqa: T201
