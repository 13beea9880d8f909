"""Adapters on the experts of a mixture, which transformers holds as one three-dimensional parameter.

Every expert e has an update of its own, s B_e A_e. Tensors are laid out as in PEFT's files: A (E R, I) expert after
expert, B (O, R E) rank after rank.

Shape suffixes: E experts, I in_features, O out_features, R rank, T tokens, N those of one expert, K experts of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_cli.ops.low_rank import Projection, low_rank_linear

STACKED = ("gate_up_proj", "down_proj")  # in the order of the model's parameters, which PEFT's names depend on


def stack_shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(E, I, O) of a stacked parameter; some models store (E, I, O), most (E, O, I)."""
    first, second, third = getattr(module, name).shape
    return (first, second, third) if getattr(module, "is_transposed", False) else (first, third, second)


class LoRAStack(nn.Module):
    """The trained updates of one stacked parameter, float32."""

    start_A = start_B = lora_magnitude_vector = None  # as a plain LoRALinear's

    def __init__(self, shape: tuple[int, int, int], r: int, scaling: float, device: torch.device) -> None:
        super().__init__()
        self.experts, in_features, out_features = shape
        self.lora_A = nn.Parameter(torch.zeros(self.experts * r, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r * self.experts, device=device))
        self.scaling = scaling

    @property
    def r(self) -> int:
        return self.lora_A.shape[0] // self.experts

    @property
    def file_rank(self) -> int:
        return self.r

    def factors_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) of one expert."""
        return expert_factors(self.lora_A, self.lora_B, expert, self.experts)

    def update(self, transposed: bool) -> Tensor:
        """s B_e A_e of all experts, as the parameter is stored."""
        return stacked_update(self.lora_A, self.lora_B, self.scaling, self.experts, transposed)

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        self.lora_A.copy_(a)
        self.lora_B.copy_(b)

    def trained(self) -> dict[str, Tensor]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.begin(tensors["lora_A"], tensors["lora_B"])


def expert_factors(lora_A: Tensor, lora_B: Tensor, expert: int, experts: int) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of one expert, of a stack's A (E R, I) and B (O, R E)."""
    return lora_A.unflatten(0, (experts, -1))[expert], lora_B.unflatten(1, (-1, experts))[:, :, expert]


def stacked_update(lora_A: Tensor, lora_B: Tensor, scaling: float, experts: int, transposed: bool) -> Tensor:
    """(E, O, I) s B_e A_e in float32; (E, I, O) where the parameter is stored so."""
    a_ERI = lora_A.float().unflatten(0, (experts, -1))
    b_EOR = lora_B.float().unflatten(1, (-1, experts)).permute(2, 0, 1)
    update_EOI = torch.bmm(b_EOR * scaling, a_ERI)
    return update_EOI.transpose(1, 2) if transposed else update_EOI


class LoRAExperts(nn.Module):
    """A module of stacked experts, with updates on some of its parameters."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def stack(self, name: str, r: int, scaling: float) -> LoRAStack:
        """Put an update on one of the base's parameters."""
        stack = LoRAStack(stack_shape(self.base, name), r, scaling, getattr(self.base, name).device)
        self.add_module(name, stack)
        return stack

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if is_plain(self.base):
            return self._each(hidden_states, top_k_index, top_k_weights)
        stacks = {name: getattr(self, name) for name in STACKED if hasattr(self, name)}
        changed = {name: self._whole(name, stack) for name, stack in stacks.items()}
        called: Tensor = functional_call(self.base, changed, (hidden_states, top_k_index, top_k_weights))
        return called

    def _whole(self, name: str, stack: LoRAStack) -> Tensor:
        weight: Tensor = getattr(self.base, name)
        transposed = bool(getattr(self.base, "is_transposed", False))
        return (weight.float() + stack.update(transposed)).to(weight.dtype)

    def _each(self, x_TI: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """One expert after the other on the tokens that chose it: no matrix of all experts is formed or kept."""
        out_TI = torch.zeros_like(x_TI)
        base: Any = self.base
        for expert in range(base.gate_up_proj.shape[0]):
            tokens_N, places_N = torch.where(chosen_TK == expert)
            if not len(tokens_N):
                continue
            gate, up = low_rank_linear(x_TI[tokens_N], [self._projection("gate_up_proj", expert)])[0].chunk(2, -1)
            y_NI = low_rank_linear(base.act_fn(gate) * up, [self._projection("down_proj", expert)])[0]
            out_TI = out_TI.index_add(0, tokens_N, (y_NI * weights_TK[tokens_N, places_N, None]).to(out_TI.dtype))
        return out_TI

    def _projection(self, name: str, expert: int) -> Projection:
        weight_OI = getattr(self.base, name)[expert]
        stack = getattr(self, name, None)
        if stack is None:
            return Projection(weight_OI)
        a_RI, b_OR = stack.factors_of(expert)
        return Projection(weight_OI, None, a_RI, b_OR, stack.scaling)


def is_plain(experts: Any) -> bool:
    """Whether every expert is down(act(gate x) * up x) with its two matrices stored (O, I), by its own account."""
    gate = getattr(type(experts), "_apply_gate", None)
    return (
        all(hasattr(experts, name) for name in (*STACKED, "act_fn"))
        and getattr(gate, "__name__", "") == "_default_apply_gate"
        and all(getattr(experts, flag, None) is True for flag in ("has_gate", "is_concatenated"))
        and not any(getattr(experts, flag, False) for flag in ("has_bias", "is_transposed", "has_post_expert_norm"))
    )
