"""AdamW against its formula in float64; weight decay on matrices only; a state that survives a file."""

from __future__ import annotations

import torch
from torch import nn

from lora_cli.recipe import TrainingSection
from lora_cli.training.optimizer import build_optimizer, load_optimizer, optimizer_tensors, trained_parameters

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


def take_steps(model: Small, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.matrix.grad, model.vector.grad = gradients(step)
        optimizer.step()


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
    take_steps(model, build_optimizer(model, TRAINING), range(6))
    matrix = adamw_float64(before["matrix"], [gradients(step)[0] for step in range(6)], weight_decay=0.1)
    vector = adamw_float64(before["vector"], [gradients(step)[1] for step in range(6)], weight_decay=0.0)
    torch.testing.assert_close(model.matrix.double(), matrix, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.vector.double(), vector, rtol=1e-6, atol=1e-6)
    swapped = adamw_float64(before["vector"], [gradients(step)[1] for step in range(6)], weight_decay=0.1)
    assert (swapped - vector).abs().max() > 1e-3, "the claim would not notice a decayed vector"


def test_frozen_parameters_and_those_without_a_gradient_stay_bit_equal():
    model = Small()
    frozen, unused = model.frozen.clone(), model.unused.detach().clone()
    take_steps(model, build_optimizer(model, TRAINING), range(3))
    assert torch.equal(model.frozen, frozen)
    assert torch.equal(model.unused, unused)


def test_every_trained_parameter_is_in_exactly_one_group():
    model = Small()
    groups = build_optimizer(model, TRAINING).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays == {id(model.matrix): 0.1, id(model.unused): 0.1, id(model.vector): 0.0}
    assert sum(len(group["params"]) for group in groups) == 3


def test_parameters_without_a_vector_among_them_make_one_group():
    model = nn.Linear(3, 2, bias=False)
    assert [len(group["params"]) for group in build_optimizer(model, TRAINING).param_groups] == [1]


def test_trained_parameters_are_named_as_in_the_base_model():
    model = nn.ModuleDict({"q_proj": nn.ModuleDict({"base": nn.Linear(2, 2)})})
    assert list(trained_parameters(model)) == ["q_proj.weight", "q_proj.bias"]


def test_a_state_put_back_from_tensors_goes_on_bit_for_bit():
    straight = Small()
    optimizer = build_optimizer(straight, TRAINING)
    take_steps(straight, optimizer, range(3))
    resumed = Small()
    resumed.load_state_dict(straight.state_dict())
    fresh = build_optimizer(resumed, TRAINING)
    load_optimizer(resumed, fresh, {name: t.clone() for name, t in optimizer_tensors(straight, optimizer).items()})
    forgetful = Small()
    forgetful.load_state_dict(straight.state_dict())
    take_steps(straight, optimizer, range(3, 6))
    take_steps(resumed, fresh, range(3, 6))
    take_steps(forgetful, build_optimizer(forgetful, TRAINING), range(3, 6))
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    assert not torch.equal(straight.matrix, forgetful.matrix), "the moments would not matter"


def test_the_state_is_named_by_moment_and_parameter_and_holds_nothing_else():
    model = Small()
    optimizer = build_optimizer(model, TRAINING)
    assert optimizer_tensors(model, optimizer) == {}
    take_steps(model, optimizer, range(1))
    assert sorted(optimizer_tensors(model, optimizer)) == [
        f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in ("matrix", "vector")
    ]
