"""A model's dropout modules, drawn the faster way."""

from __future__ import annotations

import torch
from torch import nn

from lora_cli.fusion.dropping import quicken_dropout, restore_dropout


class Other(nn.Dropout):
    """Not what it is called."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def model_of(*dropouts: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), *dropouts)


def test_it_falls_as_often_while_training_and_never_afterwards():
    model = model_of(nn.Dropout(0.3))
    quicken_dropout(model)
    x = torch.ones(500, 8)
    drop = model[1]
    y = drop(x)
    assert abs(float((y == 0).float().mean()) - 0.3) < 0.05
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.7), rtol=1e-4)
    assert torch.equal(drop.eval()(x), x)
    drop.train().p = 0.0  # as it is when asked, not as it was when quickened
    assert torch.equal(drop(x), x)


def test_modules_that_are_more_are_left_alone_and_all_get_their_own_code_back():
    hooked, inplace, other, plain = nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), Other(0.5), nn.Dropout(0.5)
    hooked.register_forward_hook(lambda module, args, output: output)
    model = model_of(hooked, inplace, other, plain)
    quicken_dropout(model)
    assert [module for module in model.modules() if "forward" in vars(module)] == [plain]
    restore_dropout(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_with_the_same_seed_are_the_same():
    model = model_of(nn.Dropout(0.5))
    quicken_dropout(model)
    x, found = torch.randn(20, 8), []
    for _ in range(2):
        torch.manual_seed(2)
        found.append(torch.autograd.grad(model(x).square().sum(), model[0].weight)[0])
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.autograd.grad(model(x).square().sum(), model[0].weight)[0])
