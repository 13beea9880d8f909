"""Methods on factors by hand, and against PEFT's own; what is random is seeded."""

from __future__ import annotations

import pytest
import torch
from peft.utils.merge_utils import ties

from lora_cli.adapters.adapter import LowRank
from lora_cli.adapters.combining import METHODS, SPARSE, Settings, agreed, combine_updates, dropped, trimmed
from lora_cli.seeds import stream
from tests.adapters.test_spectrum import dense, made


def pair() -> list[LowRank]:
    return [made(4, 20, 30), made(4, 20, 30, seed=1, scaling=0.5)]


def test_trimming_keeps_the_largest():
    tensor = torch.tensor([[0.1, -3.0, 2.0], [0.5, -0.2, 1.0]])
    assert trimmed(tensor, 0.5).tolist() == [[0, -3, 2], [0, 0, 1]]
    assert torch.equal(trimmed(tensor, 1.0), tensor)
    assert trimmed(tensor, 0.34).tolist() == [[0, -3, 2], [0, 0, 0]]  # 2.04 numbers are 2


def test_those_of_the_elected_sign_are_averaged():
    found = agreed([torch.tensor([2.0, -1.0, 1.0, 0.0]), torch.tensor([-1.0, -3.0, 3.0, 0.0])], [1.0, 1.0])
    assert found.tolist() == [2.0, -2.0, 2.0, 0.0]


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_of_tensors_is_peft_s(density):
    tensors = [made(4, 20, 30, seed=seed).lora_A for seed in range(3)]
    weights = [0.7, -0.3, 1.1]
    expected = ties(tensors, torch.tensor(weights), density)
    found = agreed([trimmed(tensor, density) for tensor in tensors], weights)
    assert float((found - expected).abs().max()) < 1e-6


def test_dropping_keeps_the_mean_and_the_share():
    kept = dropped(torch.ones(200_000), 0.3, stream(0, "test"))
    assert float(kept.mean()) == pytest.approx(1, abs=0.02)
    assert float((kept != 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(kept.max()) == pytest.approx(1 / 0.3)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, -1.0]])
def test_cat_is_the_exact_sum_and_svd_its_best_approximation(weights):
    total = sum(w * dense(u) for u, w in zip(pair(), weights, strict=True))
    cat = combine_updates("m", pair(), weights, Settings("cat"))
    assert len(cat.lora_A) == 8
    assert float((dense(cat) - total).abs().max()) < 1e-5
    u, values, v = torch.linalg.svd(total)
    for rank in (2, None):
        found = combine_updates("m", pair(), weights, Settings("svd", rank=rank))
        n = rank or 4
        assert len(found.lora_A) == n
        assert float((dense(found) - u[:, :n] * values[:n] @ v[:n]).abs().max()) < 1e-5


def test_linear_has_the_cross_terms_of_its_factors():
    one, other = pair()
    a = (0.7 * 1.7) ** 0.5 * one.lora_A.double() + (0.3 * 0.5) ** 0.5 * other.lora_A.double()
    b = (0.7 * 1.7) ** 0.5 * one.lora_B.double() + (0.3 * 0.5) ** 0.5 * other.lora_B.double()
    found = combine_updates("m", [one, other], [0.7, 0.3], Settings("linear"))
    assert float((dense(found) - b @ a).abs().max()) < 1e-5
    negative = combine_updates("m", [one], [-1.0], Settings("linear"))
    assert float((dense(negative) + dense(one)).abs().max()) < 1e-5  # one side alone carries the sign


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_the_seed_and_the_module_choose_what_is_dropped(method):
    def made_with(seed: int, name: str = "m") -> torch.Tensor:
        return combine_updates(name, pair(), [0.7, 0.3], Settings(method, seed=seed)).lora_A

    assert torch.equal(made_with(1), made_with(1))
    assert not torch.equal(made_with(1), made_with(2))
    assert not torch.equal(made_with(1), made_with(1, "other"))


def test_dare_at_density_one_is_the_method_without_it():
    for method, plain in (("dare_linear", "linear"), ("dare_ties", "ties")):
        found = combine_updates("m", pair(), [0.7, 0.3], Settings(method, density=1.0))
        expected = combine_updates("m", pair(), [0.7, 0.3], Settings(plain, density=1.0))
        assert torch.equal(found.lora_A, expected.lora_A)
        assert torch.equal(found.lora_B, expected.lora_B)


@pytest.mark.parametrize("method", METHODS)
def test_the_type_is_that_of_the_inputs_and_the_scale_is_one(method):
    updates = [LowRank(u.lora_A.bfloat16(), u.lora_B.bfloat16(), u.scaling) for u in pair()]
    found = combine_updates("m", updates, [0.7, 0.3], Settings(method))
    assert {found.lora_A.dtype, found.lora_B.dtype} == {torch.bfloat16}
    assert found.scaling == 1
    assert set(SPARSE) < set(METHODS)
