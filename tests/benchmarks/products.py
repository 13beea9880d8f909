"""What a training step must multiply at least, in closed form: the limit runs it, the utilisation counts it.

A frozen matrix W (O, I) costs 2 O I operations a token forward and, where something below it is trained, 2 O I more
for the gradient of its input; there is no gradient of W itself. Nothing below the queries, keys and values of the
lowest adapted layer is trained, so these need no gradient of their input, and the layers below none at all. Behind the
last layer's keys and values nothing is looked at but the supervised positions, or the one of a classifier's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.shapes import Row, Shape

WITH_SMALLER = "with_smaller_tokens_per_second"  # of the limit: the adapters' and attention's products, too
BY_ITSELF = "torch_tokens_per_second"  # of the limit: with the library that torch would take


@dataclass(frozen=True)
class Product:
    """One frozen matrix of the model."""

    outputs: int
    inputs: int
    input_gradient: bool = True
    on_targets: bool = False  # at the supervised positions only

    def flops(self, tokens: int, targets: int) -> int:
        rows = targets if self.on_targets else tokens
        return 2 * rows * self.outputs * self.inputs * (2 if self.input_gradient else 1)


def products(shape: Shape) -> list[Product]:
    """Every matrix that a step of this shape multiplies with, once."""
    c = shape.config
    hidden, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    kv = hidden // c["num_attention_heads"] * c.get("num_key_value_heads", c["num_attention_heads"])
    lowest = shape.adapted_layers[0]
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    mlp = [(inner, hidden)] * (2 if c["model_type"] == "llama" else 1) + [(hidden, inner)]
    found = [
        Product(
            outputs,
            inputs,
            input_gradient=layer > lowest or (layer == lowest and place >= 3),
            on_targets=layer == layers - 1 and place not in (1, 2),
        )
        for layer in range(layers)
        for place, (outputs, inputs) in enumerate([*attention, *mlp])
    ]
    head = c["vocab_size"] if shape.task == "causal_lm" else hidden  # BERT's pooler; its two classes are nothing
    return [*found, Product(head, hidden, on_targets=True)]


def product_flops(shape: Shape, rows: Sequence[Row]) -> int:
    tokens, targets = sum(len(row.ids) for row in rows), sum(row.num_targets for row in rows)
    return sum(product.flops(tokens, targets) for product in products(shape))


def attention_flops(shape: Shape, rows: Sequence[Row]) -> int:
    """Two products forward (scores, values) and four backward, 2 D for each pair of tokens; none for hidden ones.

    The last layer has queries at supervised positions only, and what lies below the adapters no backward pass.
    """
    hidden_pairs = 1 if shape.config["model_type"] == "llama" else 0
    below = sum((2 - hidden_pairs) * len(row.ids) ** 2 for row in rows)
    last = sum(row.num_targets * (2 * len(row.ids) - hidden_pairs * row.num_targets) for row in rows)
    forward = (shape.config["num_hidden_layers"] - 1) * below + last
    backward = (len(shape.adapted_layers) - 1) * below + last
    return shape.config["hidden_size"] * (2 * forward + 4 * backward)


def model_flops_per_token(shape: Shape) -> float:
    """4 N and the attention: N counts the layers for every token, and the head for supervised ones only."""
    rows = shape.rows()
    return (product_flops(shape, rows) + attention_flops(shape, rows)) / sum(len(row.ids) for row in rows)


# Dense bfloat16 operations a second on tensor cores, by the vendor's data sheet; the longer name comes first.
CARD_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def card_peak(device: str) -> float | None:
    """None for a card that is not in the table, and for processors."""
    return next((peak for name, peak in CARD_PEAKS.items() if name in device), None)
