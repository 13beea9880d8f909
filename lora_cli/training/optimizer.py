"""AdamW over the trained parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_cli.adapters.injection import base_name
from lora_cli.recipe import TrainingSection


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {base_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def build_optimizer(model: nn.Module, training: TrainingSection) -> torch.optim.AdamW:
    """Decoupled weight decay (arXiv:1711.05101) on matrices; biases and norms are not pulled to zero."""
    parameters = list(trained_parameters(model).values())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Its state by parameter name, ready for safetensors: ``exp_avg/<parameter>`` and so on."""
    return {
        f"{key}/{name}": value.detach().cpu().contiguous()
        for name, parameter in trained_parameters(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put ``optimizer_tensors`` back; the step counters stay where the fused kernel wants them."""
    parameters = trained_parameters(model)
    for name, value in tensors.items():
        key, _, parameter_name = name.partition("/")
        parameter = parameters[parameter_name]
        optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
