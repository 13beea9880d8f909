"""What sums are accumulated in.

Shape suffixes: B matrices; M, K and N any sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where that is what is computed in."""
    return torch.promote_types(dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_type(tensor.dtype))


def wide_product(a_BMK: Tensor, b_BKN: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """a b in the wide type, from narrower ones: (B, M, K) times (B, K, N).

    ``dtype`` is that of the numbers, where the tensors hold them in the wide type already.
    """
    with _multiplying_in(dtype or a_BMK.dtype):
        return torch.bmm(wide(a_BMK), wide(b_BKN))


@contextmanager
def _multiplying_in(dtype: torch.dtype) -> Iterator[None]:
    """Let the CPU's library multiply float32 matrices that hold bfloat16 values as bfloat16.

    Nothing is rounded by it: every product of two bfloat16 numbers is a float32 number, and sums stay float32.
    With AMX the processor has such products; without, oneDNN multiplies in float32 then, which is no slower than MKL
    and on other makers' processors twice as fast (``products``).
    """
    if dtype != torch.bfloat16:
        yield
        return
    library: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, library.fp32_precision = library.fp32_precision, "bf16"
    try:
        yield
    finally:
        library.fp32_precision = before
