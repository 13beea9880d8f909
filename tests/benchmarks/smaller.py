"""The smaller products that a training step cannot do without either: those of the adapters and of attention.

Of n tokens an adapter makes, beside x (n, I) and dy (n, O), in rank R (arXiv:2106.09685, eq. 3, and its derivatives):

    z = x A^T    y = z B^T    g = dy B    dB = dy^T z    dA = g^T x    dx = g A

Matrices that share their input share the product with A, and that for dx. Attention of T tokens by q queries makes
Q K^T and P V, and backward dO V^T, P^T dO, dS K and dS^T Q. Where half of all pairs is hidden, half as many queries see
every key: the same number of operations in the size that a library likes best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from tests.benchmarks.products import Product, products
from tests.benchmarks.shapes import RANK, Row, Shape


class Small(NamedTuple):
    """``batch`` products of (M, K) and (K, N)."""

    batch: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


def smaller_products(shape: Shape, rows: Sequence[Row]) -> list[Small]:
    """Of one step over these rows."""
    tokens, targets = sum(len(row.ids) for row in rows), sum(row.num_targets for row in rows)
    layers = shape.config["num_hidden_layers"]
    matrices = products(shape)[:-1]  # the head has no adapter
    each = len(matrices) // layers
    found: list[Small] = []
    for layer in range(layers):
        adapted = layer in shape.adapted_layers
        if adapted:
            for group in _groups(shape, matrices[layer * each : (layer + 1) * each]):
                found.extend(_of_adapters(group, targets if group[0].on_targets else tokens))
        for row in rows:
            found.extend(_of_attention(shape, row, is_last=layer == layers - 1, backward=adapted))
    return found


def _groups(shape: Shape, layer: list[Product]) -> Iterator[list[Product]]:
    """Those that share their input, at the same positions."""
    last = len(layer) - 1
    reads = [0, 0, 0, 1, *([2] * (last - 4)), 3]  # q, k, v; o; gate and up, or what BERT has in their place; down
    for _, group in groupby(zip(reads, layer, strict=True), key=lambda pair: (pair[0], pair[1].on_targets)):
        yield [product for _, product in group]


def _of_adapters(group: list[Product], n: int) -> Iterator[Small]:
    inputs, ranks = group[0].inputs, RANK * len(group)
    yield Small(1, n, inputs, ranks)
    for product in group:
        yield Small(1, n, RANK, product.outputs)
        yield Small(1, n, product.outputs, RANK)
        yield Small(1, product.outputs, n, RANK)
    yield Small(1, ranks, n, inputs)
    if group[0].input_gradient:
        yield Small(1, n, ranks, inputs)


def _of_attention(shape: Shape, row: Row, *, is_last: bool, backward: bool) -> Iterator[Small]:
    c, keys = shape.config, len(row.ids)
    heads = c["num_attention_heads"]
    batch, size = c.get("num_key_value_heads", heads), c["hidden_size"] // heads
    asked = row.num_targets if is_last else keys
    pairs = asked * (2 * keys - asked) // 2 if c["model_type"] == "llama" else asked * keys
    queries = max(1, pairs // keys) * (heads // batch)
    scores, values = Small(batch, queries, size, keys), Small(batch, queries, keys, size)
    yield from (scores, values)
    if backward:
        yield from (scores, values, *[Small(batch, keys, queries, size)] * 2)
