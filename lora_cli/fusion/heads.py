"""The output head as a formula, where that is shown to give the model's own logits, and the kernels of its loss.

Shape suffixes: D hidden size, M positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from lora_cli.adapters.layer import has_hooks, projection_of
from lora_cli.adapters.tokens import parts_of
from lora_cli.data.batches import Batch
from lora_cli.errors import first_line
from lora_cli.fusion.forms import close
from lora_cli.fusion.looks import heads_of
from lora_cli.fusion.network import Network, takes_positions
from lora_cli.fusion.probing import TOLERANCES
from lora_cli.ops.cross_entropy import Head, loss_and_gradient
from lora_cli.ops.kernels import Kernels

NO_FORMULA = "the loss holds all logits at once: this architecture's head is not a plain one"
NOT_THESE = {Kernels.COMPILED: "the loss is not compiled", Kernels.LIGER: "the loss is not Liger's"}


def proven_head(network: Network, batch: Batch, choices: Sequence[Kernels]) -> tuple[Head | None, list[str]]:
    """The head with the first of these kernels that give its loss; None where it is no formula; and notes."""
    model = network.model
    output = model.get_output_embeddings()
    table, ids_T, rows_TD = parts_of(output)
    if type(table) is not nn.Linear or not takes_positions(model):
        return None, []
    if (projection_of(table) is None and not table.weight.requires_grad) or (table is not output and has_hooks(output)):
        return None, []
    hidden_MD = network.supervised_hidden(batch)
    expected_MV = network.supervised_logits(batch)
    for plain in heads_of(model, table):
        head = replace(plain, ids_T=ids_T, rows_TD=rows_TD)
        if close(head.logits(hidden_MD).to(expected_MV.dtype), expected_MV, _tolerance(expected_MV)):
            return _with_kernels(head, expected_MV, batch.targets, choices)
    return None, [NO_FORMULA]


def _tolerance(logits_MV: Tensor) -> float:
    """Less than of a whole model: between a head's states and its logits lies one product."""
    return TOLERANCES[logits_MV.dtype] / 10


def _with_kernels(
    head: Head, logits_MV: Tensor, targets_M: Tensor, choices: Sequence[Kernels]
) -> tuple[Head | None, list[str]]:
    notes: list[str] = []
    for kernels in choices:
        chosen = replace(head, kernels=kernels)
        reason = None if kernels is Kernels.PLAIN else _why_not(chosen, head, logits_MV, targets_M)
        if reason is None:
            return chosen, notes
        notes.append(f"{NOT_THESE[kernels]}: {reason}")
    raise AssertionError("the last choice is the plain formula")


def _why_not(head: Head, plain: Head, logits_MV: Tensor, targets_M: Tensor) -> str | None:
    gradients = [logits_MV.clone(), logits_MV.clone()]
    expected = loss_and_gradient(gradients[0], targets_M, plain)
    try:
        found = loss_and_gradient(gradients[1], targets_M, head)
    except Exception as error:  # whatever a compiler or a library of kernels raises
        return first_line(error)
    tolerance = _tolerance(logits_MV)
    same = close(found, expected, tolerance) and close(gradients[1], gradients[0], tolerance)
    return None if same else "it gives something else"
