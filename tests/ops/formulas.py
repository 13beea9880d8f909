"""The element-wise formulas that have kernels of several kinds, by name."""

from __future__ import annotations

from lora_cli.ops import cross_entropy, elementwise, gated

FORMULAS = {
    formula.__name__: formula
    for formula in (
        elementwise._rms_norm_forward,
        elementwise._rms_norm_backward,
        elementwise._rotated_by_halves,
        gated._inner,
        gated._inner_backward,
        cross_entropy._losses_and_gradient,
    )
}
