"""Which library multiplies float32 matrices: chosen only where it is faster, and only if it rounds nothing."""

from pathlib import Path

import pytest
import torch

from lora_cli.ops import products

CPU = torch.device("cpu")
LARGE, SMALL = 2**16, 2**16 - 1


@pytest.fixture
def hampered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which MKL leaves half of the speed unused."""
    monkeypatch.setattr(products, "_hampered", lambda: True)
    monkeypatch.setattr(products, "_multiplies_exactly", lambda: True)


@pytest.mark.usefixtures("hampered")
@pytest.mark.parametrize(
    ("weights", "faster"),
    [
        ([LARGE], True),
        ([SMALL], False),
        ([SMALL, SMALL, 1000 * LARGE], False),  # a large vocabulary on a small model
        ([LARGE, LARGE, SMALL], True),
        ([], False),
    ],
)
def test_large_float32_matrices_of_the_cpu_are_given_to_onednn(weights, faster):
    assert products.choose_products(weights, torch.float32, CPU) == faster
    assert products.onednn_multiplies() == faster
    assert torch.get_float32_matmul_precision() == ("medium" if faster else "highest")
    for dtype, device in ((torch.float32, "cuda"), (torch.bfloat16, "cpu"), (torch.float64, "cpu")):
        assert not products.choose_products(weights, dtype, torch.device(device))
        assert not products.onednn_multiplies()  # each model decides anew


@pytest.mark.parametrize("found", ["_hampered", "_multiplies_exactly"])
def test_not_where_mkl_is_fast_nor_where_a_trial_shows_rounding(found, hampered, monkeypatch):
    monkeypatch.setattr(products, found, lambda: False)
    assert not products.choose_products([LARGE], torch.float32, CPU)
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_trial_leaves_the_setting_as_it_was_and_a_library_that_fails_is_not_chosen(monkeypatch):
    products._multiplies_exactly.__wrapped__()
    assert not products.onednn_multiplies()

    def fails(*sizes: int) -> bool:
        assert products.onednn_multiplies()
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(products, "_is_exact", fails)
    assert not products._multiplies_exactly.__wrapped__()
    assert not products.onednn_multiplies()


@pytest.mark.usefixtures("hampered")
def test_what_was_chosen_in_between_is_not_found_afterwards():
    with products.products_as_before():
        assert products.choose_products([LARGE], torch.float32, CPU)
        with products.products_as_before():
            products.choose_products([SMALL], torch.float32, CPU)
        assert products.onednn_multiplies()
    assert not products.onednn_multiplies()
    assert torch.get_float32_matmul_precision() == "highest"  # other libraries ask for it, and may


@pytest.mark.parametrize("sizes", products.TRIAL_SIZES)
def test_the_trial_passes_in_float32_and_would_show_any_bit_lost(sizes, monkeypatch):
    assert products._is_exact(*sizes)
    fine = products._fine
    for narrow in (torch.bfloat16, torch.float16):
        monkeypatch.setattr(products, "_fine", lambda m, k, narrow=narrow: _Rounding.wrap(fine(m, k), narrow))
        assert not products._is_exact(*sizes)


class _Rounding(torch.Tensor):
    """Numbers that are rounded where they are multiplied, and nowhere else."""

    narrow: torch.dtype

    @staticmethod
    def wrap(tensor: torch.Tensor, narrow: torch.dtype) -> "_Rounding":
        wrapped = tensor.as_subclass(_Rounding)
        wrapped.narrow = narrow
        return wrapped

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        narrow = next((a.narrow for a in args if isinstance(a, _Rounding)), torch.bfloat16)
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, _Rounding) else a for a in args]
        multiplies = function.__name__ in ("matmul", "__matmul__", "__rmatmul__", "bmm", "addmm")
        if multiplies:
            plain = [a.to(narrow).float() for a in plain]
        result = function(*plain, **(kwargs or {}))
        return result if multiplies or not isinstance(result, torch.Tensor) else cls.wrap(result, narrow)


@pytest.mark.parametrize(("m", "k", "n"), [(97, 576, 1536), (256, 1536, 576), (48, 64, 48), (131, 16, 576)])
def test_products_are_as_exact_as_before(m, k, n):
    """Within float32's error of a sum of k terms; a product of rounded factors is not."""
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("with AMX the setting means bfloat16, and is never chosen")
    torch.manual_seed(0)
    a, b = torch.randn(m, k), torch.randn(k, n)
    exact = a.double() @ b.double()
    bound = 2**-24 * k * (a.double().abs() @ b.double().abs())
    products._ask(True)
    ways = [a @ b, a @ b.T.contiguous().T, (b.T @ a.T).T, torch.bmm(a[None], b[None])[0], torch.addmm(a @ b, a, b) / 2]
    for product in ways:
        assert ((product.double() - exact).abs() <= bound).all()
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert not ((rounded - exact).abs() <= bound).all()


def test_a_processor_says_who_made_it(tmp_path, monkeypatch):
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr(products, "Path", lambda _: Path(told))
    assert products._maker() is None
    told.write_text("processor : 0\nvendor_id\t: AuthenticAMD\nmodel name : any\n", encoding="utf-8")
    assert products._maker() == "AuthenticAMD"
    told.write_text("processor : 0\n", encoding="utf-8")
    assert products._maker() is None


@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD", None])
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_mkl_is_slow_on_other_makers_processors_with_avx512(maker, amx, capability, monkeypatch):
    monkeypatch.setattr(products, "_maker", lambda: maker)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    asked = products._hampered.__wrapped__()
    assert asked == (maker == "AuthenticAMD" and not amx and capability == "AVX512")
