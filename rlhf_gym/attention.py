"""Attention of a decoding step on a CPU: one query a row, in two batched matrix products.

PyTorch's scaled_dot_product_attention is made for many queries; for one it takes twice as long, and
for grouped heads transformers copies every key and value first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "rlhf_gym_step"

HARMLESS = ("position_ids", "use_cache", "cache_position")
"""What models pass along that changes no attention."""


def step_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: the same numbers as "sdpa", up to rounding.

    Args:
        module: The layer.
        query: (N, heads, 1, head_dim); any other number of queries is left to "sdpa".
        key: (N, key heads, columns, head_dim); key heads divide heads.
        value: The same.
        attention_mask: (N, 1, 1, columns), additive.
        dropout: Must be 0.
        scaling: Of the scores; 1 / √head_dim if None.
        **options: For "sdpa", where one of them asks for something else than plain attention.

    Returns:
        (N, 1, heads, head_dim), and no weights.
    """
    n, heads, queries, width = query.shape
    special = dropout or any(v is not None for k, v in options.items() if k not in HARMLESS)
    plain = queries == 1 and query.dtype == torch.float32 and not special
    if not plain or attention_mask is None or torch.is_grad_enabled():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    # Heads of a group are as many queries of one batched product: no key is copied.
    groups = heads // key.shape[1]
    asked = query.reshape(-1, groups, width)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    mask = attention_mask.expand(n, key.shape[1], groups, -1).flatten(0, 1)
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(mask, asked, keys.transpose(1, 2), alpha=scale)
    seen = torch.bmm(torch.softmax(scores, -1), values)
    return seen.view(n, 1, heads, -1), None


AttentionInterface.register(NAME, step_attention)


@contextmanager
def for_a_step(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model attends by `step_attention` if it would by "sdpa", on a CPU."""
    config = model.config.get_text_config()
    usual = config._attn_implementation
    if usual != "sdpa" or model.device.type != "cpu":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual
