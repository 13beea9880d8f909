"""AdamW against its formula in float64; weight decay on matrices only; a state that survives a file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_cli.recipe import TrainingSection
from lora_cli.training.optimizer import FlatAdamW, trained_parameters

TRAINING = TrainingSection(
    learning_rate=0.01, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, use_cpu=True
)


class Small(nn.Module):
    """A matrix, a vector, a frozen matrix, and a parameter that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.vector = nn.Parameter(torch.randn(5, generator=generator))
        self.frozen = nn.Parameter(torch.randn(2, 2, generator=generator), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2, 2, generator=generator))


def gradients(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator) * 10.0**-step


def take_steps(model: Small, optimizer: FlatAdamW, steps: range) -> None:
    for step in steps:
        optimizer.zero_gradients()
        with torch.no_grad():
            for parameter, gradient in zip((model.matrix, model.vector), gradients(step), strict=True):
                parameter.grad.copy_(gradient)
        optimizer.update(torch.tensor(True))


def adamw_float64(weight, grads, weight_decay: float):
    """Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, with the learning rate on the decay as in torch."""
    t = TRAINING
    weight, m, v = weight.double(), 0.0, 0.0
    for number, grad in enumerate((g.double() for g in grads), start=1):
        m = t.adam_beta1 * m + (1 - t.adam_beta1) * grad
        v = t.adam_beta2 * v + (1 - t.adam_beta2) * grad**2
        m_hat, v_hat = m / (1 - t.adam_beta1**number), v / (1 - t.adam_beta2**number)
        weight = weight - t.learning_rate * (m_hat / (v_hat.sqrt() + t.adam_epsilon) + weight_decay * weight)
    return weight


def test_six_steps_are_the_formula_in_float64_with_decay_on_the_matrix_and_none_on_the_vector():
    model = Small()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    take_steps(model, FlatAdamW(model, TRAINING), range(6))
    matrix = adamw_float64(before["matrix"], [gradients(step)[0] for step in range(6)], weight_decay=0.1)
    vector = adamw_float64(before["vector"], [gradients(step)[1] for step in range(6)], weight_decay=0.0)
    torch.testing.assert_close(model.matrix.double(), matrix, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.vector.double(), vector, rtol=1e-6, atol=1e-6)
    swapped = adamw_float64(before["vector"], [gradients(step)[1] for step in range(6)], weight_decay=0.1)
    assert (swapped - vector).abs().max() > 1e-3, "the claim would not notice a decayed vector"


def test_frozen_parameters_stay_bit_equal_and_those_without_a_gradient_only_decay():
    model = Small()
    frozen, unused = model.frozen.clone(), model.unused.detach().clone()
    take_steps(model, FlatAdamW(model, TRAINING), range(3))
    assert torch.equal(model.frozen, frozen)
    torch.testing.assert_close(model.unused, unused * (1 - 0.01 * 0.1) ** 3, rtol=1e-6, atol=0)


def test_parameters_and_gradients_are_pieces_of_one_vector_with_the_values_they_had():
    model, plain = Small(), Small()
    optimizer = FlatAdamW(model, TRAINING)
    for name, place in optimizer.places.items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter, plain.get_parameter(name)), name
        place.of(optimizer.values).fill_(7.0)
        place.of(optimizer.gradients).fill_(9.0)
        assert bool((parameter == 7).all() and (parameter.grad == 9).all()), name
        assert place.start % 16 == 0, "a cache line of its own"
    assert list(optimizer.places) == ["matrix", "unused", "vector"], "matrices first: they decay"


def test_a_backward_pass_adds_to_the_vector_of_gradients():
    model, plain = Small(), Small()
    optimizer = FlatAdamW(model, TRAINING)
    for one in (model, plain):
        for _ in range(2):
            (one.matrix.square().sum() + one.vector.exp().sum()).backward()
    assert torch.equal(optimizer.places["matrix"].of(optimizer.gradients), plain.matrix.grad)
    assert torch.equal(optimizer.places["vector"].of(optimizer.gradients), plain.vector.grad)
    assert optimizer.never_reached == {"unused"}


def test_the_norm_is_that_of_all_gradients_and_clipping_is_torch_s():
    model, plain = Small(), Small()
    optimizer = FlatAdamW(model, TRAINING)
    for one in (model, plain):
        (one.matrix.square().sum() + one.vector.exp().sum()).backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    norm = optimizer.gradient_norm()
    optimizer.clip(norm, 0.5)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.matrix.grad, plain.matrix.grad, rtol=1e-6, atol=0)
    assert expected > 1, "the claim is about a gradient that is clipped"


def test_no_update_is_made_where_something_is_not_finite():
    model = Small()
    optimizer = FlatAdamW(model, TRAINING)
    take_steps(model, optimizer, range(2))
    before, state = optimizer.values.clone(), optimizer.tensors()
    optimizer.gradients.fill_(float("nan"))
    optimizer.update(torch.tensor(False))
    assert torch.equal(optimizer.values, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer.tensors().items())


def test_trained_parameters_are_named_as_in_the_base_model():
    model = nn.ModuleDict({"q_proj": nn.ModuleDict({"base": nn.Linear(2, 2)})})
    assert list(trained_parameters(model)) == ["q_proj.weight", "q_proj.bias"]


def test_a_state_put_back_from_tensors_goes_on_bit_for_bit():
    straight = Small()
    optimizer = FlatAdamW(straight, TRAINING)
    take_steps(straight, optimizer, range(3))
    resumed = Small()
    resumed.load_state_dict(straight.state_dict())
    fresh = FlatAdamW(resumed, TRAINING)
    fresh.load(optimizer.tensors())
    forgetful = Small()
    forgetful.load_state_dict(straight.state_dict())
    take_steps(straight, optimizer, range(3, 6))
    take_steps(resumed, fresh, range(3, 6))
    take_steps(forgetful, FlatAdamW(forgetful, TRAINING), range(3, 6))
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    assert not torch.equal(straight.matrix, forgetful.matrix), "the moments would not matter"


def test_the_state_is_named_by_moment_and_parameter_and_holds_nothing_else():
    model = Small()
    optimizer = FlatAdamW(model, TRAINING)
    assert optimizer.tensors() == {}
    take_steps(model, optimizer, range(1))
    names = [f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq") for name in ("matrix", "unused", "vector")]
    assert sorted(optimizer.tensors()) == [*names, "step"]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in optimizer.tensors().values()), "ready for a file"


def test_a_model_without_vectors_has_one_group():
    model = nn.Linear(3, 2, bias=False)
    optimizer = FlatAdamW(model, TRAINING)
    assert len(optimizer._adamw.param_groups) == 1


def test_loraplus_moves_every_b_faster_and_nothing_else():
    """Adam's first step is the learning rate times the gradient's sign, so the ratio of steps is that of the rates."""
    moved = {}
    for ratio in (None, 16.0):
        model = nn.Module()
        for name in ("lora_A", "lora_B", "weight", "bias"):
            setattr(model, name, nn.Parameter(torch.ones(2, 2) if name != "bias" else torch.ones(2)))
        wrapper = nn.ModuleDict({"q_proj": model})
        optimizer = FlatAdamW(wrapper, TrainingSection(loraplus_lr_ratio=ratio, weight_decay=0.0))
        optimizer.set_learning_rate(1e-3)
        for parameter in wrapper.parameters():
            parameter.grad.fill_(0.5)
        optimizer.update(torch.tensor(True))
        moved[ratio] = {name: float((1 - p.detach()).mean()) for name, p in model.named_parameters()}
    assert moved[16.0]["lora_B"] == pytest.approx(16 * moved[None]["lora_B"], rel=1e-4)
    others = ("lora_A", "weight", "bias")
    assert all(moved[16.0][name] == pytest.approx(moved[None][name], rel=1e-4) for name in others)


def test_loraplus_s_moments_go_through_a_checkpoint():
    model = nn.ModuleDict({"q": nn.Module()})
    model["q"].lora_A, model["q"].lora_B = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3, 2))
    training = TrainingSection(loraplus_lr_ratio=4.0)
    optimizer = FlatAdamW(model, training)
    for parameter in model.parameters():
        parameter.grad.normal_()
    optimizer.update(torch.tensor(True))
    saved = optimizer.tensors()
    other = FlatAdamW(model, training)
    other.load(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in other.tensors().items())
