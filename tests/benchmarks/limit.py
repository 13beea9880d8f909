"""The limit: the matrix products alone. ``python -m tests.benchmarks.limit SHAPE``, in a process of its own.

Counted is, for each step of the measured passes, in the step's dtype and at its real number of tokens N (no padding):

- per layer the forward product of every frozen matrix (Llama: q, k, v, o, gate, up, down; BERT: query, key, value and
  the three dense ones), x (N, I) times W^T;
- the product for the gradient of its input, dy (N, O) times W; not for the queries, keys and values of the
  lowest adapted layer and for nothing below, since nothing below them is trained;
- the same two for the output head (a classifier: the pooler), and of the last layer for all but keys and values, at
  the M supervised positions only (a classifier: one a row).

Where lora has float32 multiplied by the faster of torch's two libraries, that is the limit; what torch makes of the
same products by itself, and so for everybody else, is measured as well.

Not counted: adapters, attention itself, norms, activations, rotations, the loss, the optimizer, reading rows. The
products of adapters and attention (``smaller``) are measured besides, each alone: what is left of the limit with them
is as far as a step could come that computes nothing else.

Each layer has weights of its own, so they come from memory as they do in training. As some libraries are slow at odd
sizes, the passes also run with N filled up to a multiple of 48, and the faster way is the limit. A step cannot be
faster than this without multiplying less or multiplying differently; what lacks to 100 % is what all else costs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_cli.device import keep_freed_memory
from lora_cli.ops.products import choose_products
from tests.benchmarks.products import BY_ITSELF, WITH_SMALLER, Product, product_flops, products
from tests.benchmarks.shapes import SHAPES, Shape
from tests.benchmarks.smaller import Small, smaller_products

MULTIPLES = (1, 48)
Sizes = tuple[int, int]  # tokens, supervised positions


@torch.no_grad()
def measure_limit(shape: Shape) -> dict[str, float]:
    """Real tokens and operations per second of the products alone; where they differ, tokens as torch multiplies."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make = partial(torch.randn, dtype=getattr(torch, shape.dtype), device=device)
    weights = [(product, make(product.outputs, product.inputs)) for product in products(shape)]
    sizes = [(sum(len(row.ids) for row in step), sum(row.num_targets for row in step)) for step in shape.step_rows()]

    def fastest() -> float:
        ways = ([_filled(size, multiple) for size in sizes] for multiple in MULTIPLES)
        return min(_seconds(weights, way, shape.passes, make) for way in ways)

    tokens = shape.passes * sum(tokens for tokens, _ in sizes)
    by_itself = fastest()
    differs = choose_products((weight.numel() for _, weight in weights), weights[0][1].dtype, device)
    seconds = fastest() if differs else by_itself
    flops = shape.passes * product_flops(shape, shape.rows())
    beside = shape.passes * _smaller_seconds([smaller_products(shape, rows) for rows in shape.step_rows()], make)
    found = {
        "tokens_per_second": tokens / seconds,
        "flops_per_second": flops / seconds,
        WITH_SMALLER: tokens / (seconds + beside),
    }
    return found | ({BY_ITSELF: tokens / by_itself} if differs else {})


def _filled(sizes: Sizes, multiple: int) -> Sizes:
    return -(-sizes[0] // multiple) * multiple, sizes[1]


def _seconds(
    weights: list[tuple[Product, Tensor]], sizes: list[Sizes], passes: int, make: Callable[..., Tensor]
) -> float:
    """Of the measured passes, after one that is not."""
    given = {
        (width, product.on_targets): make(max(size[product.on_targets] for size in sizes), width)
        for product, _ in weights
        for width in {product.inputs, product.outputs}
    }
    began = 0.0
    for number in range(passes + 1):
        if number == 1:
            _wait()
            began = time.perf_counter()
        for size in sizes:
            for product, weight in weights:
                F.linear(given[product.inputs, product.on_targets][: size[product.on_targets]], weight)
            for product, weight in reversed(weights):
                if product.input_gradient:
                    given[product.outputs, product.on_targets][: size[product.on_targets]] @ weight
    _wait()
    return time.perf_counter() - began


def _smaller_seconds(steps: list[list[Small]], make: Callable[..., Tensor]) -> float:
    """Of a pass, after one that is not measured."""
    every = [product for step in steps for product in step]
    given, other = (
        make(max(batch * rows * columns for batch, rows, columns in sizes))
        for sizes in ([(p.batch, p.m, p.k) for p in every], [(p.batch, p.k, p.n) for p in every])
    )
    began = 0.0
    for _ in range(2):
        _wait()
        began = time.perf_counter()
        for batch, m, k, n in every:
            torch.bmm(given[: batch * m * k].view(batch, m, k), other[: batch * k * n].view(batch, k, n))
        _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(measure_limit(SHAPES[sys.argv[1]])))  # noqa: T201
