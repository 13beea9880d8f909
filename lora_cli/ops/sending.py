"""Tensors that the host made, on their way to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. On CUDA through pinned memory: from any other the host waits for the copy."""
    staged = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return staged.to(device, non_blocking=True)
