"""Attention without padding, where transformers calls it.

Under the name ``ROWS`` a function stands in transformers' AttentionInterface that gets every model's queries,
keys and values, and the lengths of the rows as a keyword that travels through the model's forward.

Shape suffixes: N tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from lora_cli.ops.attention import attend_rows
from lora_cli.ops.rows import Rows
from lora_cli.ops.sight import Sight

ROWS = "lora_rows"
ROWS_KEYWORD = "row_lengths"  # of the base model's forward; holds a ``Rows``


def rows_attention(
    module: nn.Module,
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KND: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: Rows,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """((1, N, H, D), no weights): what an attention function of transformers returns."""
    if s_aux is not None or kwargs.get("position_bias") is not None:
        raise NotImplementedError("attention with sinks or a bias")
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    sight = Sight(query_1HND.shape[-1] ** -0.5 if scaling is None else scaling, causal, sliding_window, softcap)
    row_lengths.observe(module, sight)
    query_NHD, key_NKD, value_NKD = (t[0].transpose(0, 1) for t in (query_1HND, key_1KND, value_1KND))
    return attend_rows(query_NHD, key_NKD, value_NKD, row_lengths, sight, dropout)[None], None


AttentionInterface.register(ROWS, rows_attention)
