"""Liger's Triton kernels (arXiv:2410.10989), each in the place of a formula of ours: CUDA's, and an extra.

Each takes and gives what its formula does, inside the same autograd node, so what is kept for the backward pass stays
the same. Where a kernel writes into its inputs, it gets copies: others may have kept them. Its own autograd functions
would wait for the device (the loss twice) and keep more. What a kernel does not know raises ``NotImplementedError``.

Shape suffixes: N tokens, I inner features, H heads, D head size, C positions, V vocabulary; `...` any leading
dimensions.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

# The kernels themselves are no public interface: others may want other arguments.
FIRST, BEFORE = (0, 8, 5), (0, 9)
VERSIONS = ">={},<{}".format(*(".".join(map(str, version)) for version in (FIRST, BEFORE)))
ROUNDING = "gemma"  # all in float32, rounded once, as our formula; Llama's own code rounds before the weight
INSTALL = "pip install 'lora-cli[liger]'"
IGNORED = -100  # a target that none of ours is


def why_not_here(device: torch.device) -> tuple[str, str] | None:
    """The reason and the cure; None where the right version is there, and a device that it is for."""
    if device.type != "cuda":
        return f"is for CUDA, and this run is on {device.type}", "remove it"
    try:
        found = version("liger-kernel")
    except PackageNotFoundError:
        return "needs Liger's kernels, which are not installed", INSTALL
    right = FIRST <= tuple(int(number) for number in re.findall(r"\d+", found)[:3]) < BEFORE
    return None if right else (f"needs liger-kernel {VERSIONS}, and {found} is installed", INSTALL)


def _ops(name: str) -> Any:
    return importlib.import_module(f"liger_kernel.ops.{name}")


def _warps_of_the_loss(size: int) -> int:
    """As Liger chooses them, for numbers of so many bytes."""
    if _ops("utils").is_hip():
        return 16
    arch: str = importlib.import_module("liger_kernel.utils").infer_device_arch()
    return 8 if size == 2 and arch.startswith("blackwell") else 32


def rms_norm_forward(x: Tensor, weight_D: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    y, _, rstd_N, *_ = _ops("rms_norm").rms_norm_forward(x.contiguous(), weight_D, eps, offset, ROUNDING, None)
    return y, rstd_N.view(*x.shape[:-1], 1)


def rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight_D: Tensor, offset: float) -> Tensor:
    rms_norm = _ops("rms_norm")
    block, warps = _ops("utils").calculate_settings(x.shape[-1])
    given = (dy.contiguous(), x.reshape(-1, x.shape[-1]), weight_D, rstd.reshape(-1), offset)
    rounding = rms_norm._str_to_casting_mode[ROUNDING]
    dx, _ = rms_norm.rms_norm_backward(*given, rounding, block, warps, in_place=False, row_mode=None, needs_dw=False)
    return dx


def rotated(x_NHD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor, direction: int) -> Tensor:
    """The kernel turns queries and keys together; here the keys are nobody's, of one head."""
    turned = x_NHD.clone(memory_format=torch.contiguous_format)[None].transpose(1, 2)
    nobody = x_NHD.new_empty(1, len(x_NHD), 1, x_NHD.shape[-1]).transpose(1, 2)
    cos, sin = (table.transpose(0, 1) for table in (cos_N1D, sin_N1D))
    rope = _ops("rope")
    turn = rope.rope_forward if direction == 1 else rope.rope_backward
    return turn(turned, nobody, cos, sin)[0].transpose(1, 2)[0]


def inner(gate_NI: Tensor, up_NI: Tensor, act: Callable[..., Tensor]) -> Tensor:
    h_NI: Tensor = _pair(act)[0](gate_NI.contiguous(), up_NI.contiguous())[2]
    return h_NI


def inner_backward(
    dh_NI: Tensor, gate_NI: Tensor, up_NI: Tensor, act: Callable[..., Tensor], derivative: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    forward, backward = _pair(act)
    gate, up = (x.clone(memory_format=torch.contiguous_format) for x in (gate_NI, up_NI))
    h_NI = forward(gate, up)[2]
    dgate_NI, dup_NI = backward(gate, up, dh_NI.contiguous())
    return h_NI, dgate_NI, dup_NI


def _pair(act: Callable[..., Tensor]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of an activation that Liger has, by the name of ours."""
    name = getattr(act, "__name__", "")
    theirs = {"silu": "swiglu", "_gelu_tanh": "geglu"}.get(name)
    if theirs is None:
        raise NotImplementedError(f"Liger has no kernel of {name}")
    return getattr(_ops(theirs), f"{theirs}_forward"), getattr(_ops(theirs), f"{theirs}_backward")


def losses_and_gradient(linear_CV: Tensor, targets_C: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The kernel of Liger's loss alone, which asks the device for nothing."""
    if scale != 1.0:
        raise NotImplementedError("Liger's loss scales no logits")
    loss, (count, words) = _ops("cross_entropy"), linear_CV.shape
    losses_C = torch.empty(count, dtype=torch.float32, device=linear_CV.device)
    nothing: dict[str, Any] = dict.fromkeys(("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr"))
    strides = {"token_accuracy_stride": 0, "predicted_tokens_stride": 0}
    of_means = {"n_non_ignore": count, "sum_non_ignore_weight": count, "weight_sum": 0.0}  # and this is a sum
    returned = {"RETURN_Z_LOSS": False, "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False}
    loss.liger_cross_entropy_kernel[(count,)](
        X_ptr=linear_CV,
        X_stride=linear_CV.stride(0),
        Y_ptr=targets_C,
        Y_stride=targets_C.stride(0),
        loss_ptr=losses_C,
        loss_stride=losses_C.stride(0),
        n_cols=words,
        ignore_index=IGNORED,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=softcap,
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=softcap is not None,
        HAS_GRADIENTS=True,
        BLOCK_SIZE=min(loss.MAX_FUSED_SIZE, 1 << (words - 1).bit_length()),
        num_warps=_warps_of_the_loss(linear_CV.itemsize),
        **nothing,
        **strides,
        **of_means,
        **returned,
    )
    return losses_C


# by the name of the formula whose place each takes
KERNELS: dict[str, Callable[..., Any]] = {
    "_rms_norm_forward": rms_norm_forward,
    "_rms_norm_backward": rms_norm_backward,
    "_rotated_by_halves": rotated,
    "_inner": inner,
    "_inner_backward": inner_backward,
    "_losses_and_gradient": losses_and_gradient,
}
