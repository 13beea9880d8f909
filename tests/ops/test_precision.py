"""Sums and products in the wide type against float64."""

import pytest
import torch

from lora_cli.ops.precision import wide_product

B, M, K, N = 3, 96, 64, 160


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_wide_product_rounds_none_of_its_terms(dtype: torch.dtype) -> None:
    """The error is that of float32 sums, 2^-24 a term, whatever the processor multiplies in."""
    torch.manual_seed(0)
    a_BMK, b_BKN = torch.randn(B, M, K).to(dtype), torch.randn(B, K, N).to(dtype)
    found = wide_product(a_BMK, b_BKN)
    bound = 2**-24 * K * torch.bmm(a_BMK.double().abs(), b_BKN.double().abs())
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert ((found.double() - torch.bmm(a_BMK.double(), b_BKN.double())).abs() <= bound).all()
    rounded = torch.bmm(a_BMK.bfloat16(), b_BKN.bfloat16()).double()  # the control: a narrow result is out of bounds
    assert not ((rounded - torch.bmm(a_BMK.double(), b_BKN.double())).abs() <= bound).all()


def test_the_faster_products_are_asked_for_there_and_nowhere_else() -> None:
    """float32 matrices that are no bfloat16 values must not be rounded to such, before or after."""
    library = torch.backends.mkldnn.matmul
    before = library.fp32_precision
    wide_product(torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 3, 2, dtype=torch.bfloat16))
    assert library.fp32_precision == before
    with pytest.raises(RuntimeError):
        wide_product(torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 9, 2, dtype=torch.bfloat16))
    assert library.fp32_precision == before
