"""How well two models agree: the difference of their logits on real rows.

Shape suffixes: N compared positions (or rows of a classifier), V vocabulary (or classes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_cli.data.batches import collate
from lora_cli.data.encoding import Example
from lora_cli.fusion.network import Network

MAX_POSITIONS = 512  # compared at most: a vocabulary of 128k makes 262 MB of float32 logits
MAX_ROWS = 16
MAX_TOKENS = 128  # of one row

# Mean KL divergence in nats that one rounding of every weight may cost, by the dtype of the merged weights.
LIMITS = {torch.float32: 1e-6, torch.float64: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-2}
# And no more than this share of what the adapter itself changes, or rounding has swallowed it: a wrong scale
# moves the model by about as much as the adapter does. Below the floor nothing can be told from noise.
SHARE_OF_ADAPTER = 0.25
FLOORS = {torch.float32: 1e-8, torch.float64: 1e-8, torch.float16: 1e-7, torch.bfloat16: 1e-6}


@dataclass(frozen=True)
class Agreement:
    """One model against another, by the logits of the first."""

    positions: int
    max_abs_difference: float  # of logits
    mean_kl: float  # KL(reference || other), nats
    top1_agreement: float

    def within(self, limit: float) -> bool:
        return self.mean_kl <= limit  # false for NaN too


def compared_rows(examples: list[Example]) -> list[Example]:
    """The first rows, cut short."""
    rows = []
    for example in examples[:MAX_ROWS]:
        ids, mask = example.input_ids[:MAX_TOKENS], example.supervised[:MAX_TOKENS]
        rows.append(Example(ids, mask, example.where, example.label))
    return rows


@torch.no_grad()
def logits_of(model: PreTrainedModel, task: str, rows: list[Example]) -> Tensor:
    """(N, V) float32, every position of every row up to MAX_POSITIONS; row by row, so nothing is padded."""
    model.eval()
    pieces: list[Tensor] = []
    for row in rows:
        if sum(len(piece) for piece in pieces) >= MAX_POSITIONS:
            break
        pieces.append(_row_logits(model, task, row))
    return torch.cat(pieces)[:MAX_POSITIONS]


def _row_logits(model: PreTrainedModel, task: str, row: Example) -> Tensor:
    if task == "sequence_classification":
        return Network(model).class_logits(collate([row], pad_id=0)).float()
    ids = torch.from_numpy(row.input_ids).long()[None]
    return model(input_ids=ids, use_cache=False).logits[0].float()


def limit_of(dtype: torch.dtype, adapter_kl: float) -> float:
    """The mean KL, in nats, up to which a merged model counts as the trained one."""
    dtype = dtype if dtype in LIMITS else torch.bfloat16
    return min(LIMITS[dtype], max(FLOORS[dtype], SHARE_OF_ADAPTER * adapter_kl))


def compare(reference_NV: Tensor, other_NV: Tensor) -> Agreement:
    reference, other = reference_NV.double().log_softmax(-1), other_NV.double().log_softmax(-1)
    kl_N = (reference.exp() * (reference - other)).sum(-1)
    same_N = reference_NV.argmax(-1) == other_NV.argmax(-1)
    return Agreement(
        positions=len(reference_NV),
        max_abs_difference=float((reference_NV - other_NV).abs().max()),
        mean_kl=float(kl_N.mean()),
        top1_agreement=float(same_N.float().mean()),
    )
