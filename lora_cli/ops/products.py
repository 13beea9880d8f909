"""Which of torch's two libraries multiplies float32 matrices on the CPU.

torch hands them to MKL, whose float32 products use AVX-512 on processors of its own maker only: on others they run at
half the speed of the processor. oneDNN has such products for every maker, and is asked where float32 may be multiplied
as bfloat16 ("medium" precision). It may, and it does not: of float32 tensors it has bfloat16 products for AMX alone,
and a processor without AMX multiplies in float32. That is not taken on trust, but tried: a trial's products show every
rounded bit.

Shape suffixes: M, K and N any sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Weights of a model's median matrix. oneDNN makes a kernel for each size that it meets, in a quarter of a millisecond
# and half a megabyte: products of smaller matrices do not win that back.
LEAST_WEIGHTS = 2**16
TRIAL_SIZES = ((96, 64, 80), (131, 576, 16), (16, 200, 320))  # M, K, N


def choose_products(weights: Iterable[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Let the faster library multiply with matrices of so many weights; whether that is not the one torch would take.

    Sets what torch does in the whole process, so that a model's products are the same wherever they are made.
    """
    faster = (
        dtype == torch.float32 and device.type == "cpu" and _pays(weights) and _hampered() and _multiplies_exactly()
    )
    _ask(faster)
    return faster


def onednn_multiplies() -> bool:
    """Whether that is what was chosen last."""
    return torch.get_float32_matmul_precision() == "medium"


@contextmanager
def products_as_before() -> Iterator[None]:
    """Whatever is chosen while it lasts, nobody finds it afterwards."""
    before = onednn_multiplies()
    try:
        yield
    finally:
        _ask(before)


def _ask(onednn: bool) -> None:
    if onednn != onednn_multiplies():
        torch.set_float32_matmul_precision("medium" if onednn else "highest")


def _pays(weights: Iterable[int]) -> bool:
    ordered = sorted(weights)
    return bool(ordered) and ordered[len(ordered) // 2] >= LEAST_WEIGHTS


@cache
def _hampered() -> bool:
    """Whether MKL leaves AVX-512 unused here, and oneDNN would multiply in float32."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()
    return libraries and wide and _maker() not in ("GenuineIntel", None)


def _maker() -> str | None:
    """The processor's, as Linux names it; None where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("vendor_id"))
    except (OSError, StopIteration, IndexError, ValueError):
        return None


@cache
def _multiplies_exactly() -> bool:
    """The trial. A library that cannot make such products costs speed, and no run."""
    with products_as_before():
        _ask(True)
        try:
            return all(_is_exact(*sizes) for sizes in TRIAL_SIZES)
        except RuntimeError:
            return False


def _is_exact(m: int, k: int, n: int) -> bool:
    """Sums of numbers of thirteen bits, which float32 holds exactly and bfloat16, with eight bits, does not.

    In every way in which a training step multiplies: with either side transposed, batched, added to something.
    """
    fine_MK, ones_KN = _fine(m, k), torch.ones(k, n)
    expected_MN = fine_MK.double().sum(1, keepdim=True).expand(m, n)
    lying_MK, lying_KN = fine_MK.T.contiguous().T, ones_KN.T.contiguous().T
    found = [
        fine_MK @ ones_KN,
        fine_MK @ lying_KN,
        lying_MK @ ones_KN,
        (ones_KN.T @ lying_MK.T).T,
        torch.bmm(fine_MK[None].expand(3, m, k), ones_KN[None].expand(3, k, n))[1],
        torch.addmm(torch.zeros(m, n), fine_MK, ones_KN),
    ]
    return all(torch.equal(product_MN.double(), expected_MN) for product_MN in found)


def _fine(m: int, k: int) -> Tensor:
    """(M, K): 1 + 2^-12 in every third place, else 1. No narrow type holds the former: it would be 1 too."""
    return 1 + (torch.arange(m * k) % 3 == 0).view(m, k) / 4096
