"""Replacements for PyTorch's scaled_dot_product_attention in the cases where it is slow.

On a CPU it is made for many queries. For the single query of a decoding step it takes twice as long
as two batched matrix products, and for grouped heads transformers first copies every key and value.
In bfloat16 its gradient takes two to three times as long as in float32 for sequences of 64 tokens,
1.5 times as long at 128, and the same from 256 on.

On a GPU in bfloat16 it chooses cuDNN's kernels, which make a plan for every new shape. A plan takes
tens of milliseconds, longer than sampling from a small model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_gym.lm.architecture import recomputes_activations

HARMLESS = ("position_ids", "use_cache", "cache_position", "sliding_window")
"""Keywords that models pass to attention and that do not change "sdpa": its mask has the window."""


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
    """Attention of one query per row; the same numbers as transformers' "sdpa", up to rounding.

    Args:
        module: The layer.
        query: (N, heads, 1, head_dim); for any other number of queries "sdpa" is called.
        key: (N, key heads, columns, head_dim); key heads divide heads.
        value: The same.
        attention_mask: (N, 1, 1, columns), additive or True at what is seen; all is seen if None.
        dropout: Must be 0.
        scaling: Factor of the scores; 1 / √head_dim if None.
        **options: Passed to "sdpa", which is called if one of them asks for more than plain
            attention.

    Returns:
        (N, 1, heads, head_dim), and no weights.
    """
    n, heads, queries, width = query.shape
    special = dropout or any(v is not None for k, v in options.items() if k not in HARMLESS)
    plain = queries == 1 and query.dtype in (torch.float32, torch.bfloat16) and not special
    per_head = attention_mask is not None and attention_mask.shape[1:3] != (1, 1)
    if not plain or per_head or torch.is_grad_enabled():
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    # The heads of a group become several queries of one batched product, so no key is copied.
    groups = heads // key.shape[1]
    asked = query.reshape(-1, groups, width)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    scale = width**-0.5 if scaling is None else scaling
    # In float32 even for bfloat16 inputs, as sdpa's kernels accumulate their scores.
    with torch.autocast(query.device.type, enabled=False):
        asked, keys = asked.float(), keys.float().transpose(1, 2)
        if attention_mask is None:
            scores = torch.bmm(asked * scale, keys)
        else:
            if attention_mask.dtype == torch.bool:
                attention_mask = additive_mask(~attention_mask, torch.float32)
            mask = attention_mask.expand(n, key.shape[1], groups, -1).flatten(0, 1)
            scores = torch.baddbmm(mask.float(), asked, keys, alpha=scale)
        seen = torch.bmm(torch.softmax(scores, -1), values.float())
    return seen.view(n, 1, heads, -1).to(query.dtype), None


def float32_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The "sdpa" of transformers, computed in float32 for inputs of any type.

    Arguments and result are those of "sdpa"; the result has the type of the query.
    """
    with torch.autocast(query.device.type, enabled=False):
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        seen, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **options
        )
    return seen.to(query.dtype), None


def additive_mask(unseen: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive attention mask: 0, and the type's lowest number where `unseen` (bool) is True.

    Not -inf: a row that is masked everywhere would have a softmax of NaN.
    """
    mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
    return mask.masked_fill_(unseen, torch.finfo(dtype).min)


@contextmanager
def for_a_step(model: PreTrainedModel) -> Iterator[None]:
    """On a CPU, use `step_attention` inside this context, if the model would use "sdpa"."""
    with _instead(step_attention) if _attends_by_sdpa(model) else nullcontext():
        yield


@contextmanager
def for_bfloat16(model: PreTrainedModel) -> Iterator[None]:
    """Fast attention for bfloat16 inside this context.

    On a CPU `float32_attention` replaces "sdpa"; on a GPU "sdpa" does not use cuDNN's kernels. With
    gradient checkpointing nothing changes: the backward pass recomputes layers outside this
    context, and would get other activations.
    """
    if model.training and recomputes_activations(model):
        within: AbstractContextManager[None] = nullcontext()
    elif model.device.type == "cuda":
        within = without_cudnn()
    else:
        within = _instead(float32_attention) if _attends_by_sdpa(model) else nullcontext()
    with within:
        yield


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Inside this context scaled_dot_product_attention does not use cuDNN's kernels."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _attends_by_sdpa(model: PreTrainedModel) -> bool:
    """Whether a model uses "sdpa" on a CPU, and it is not replaced already."""
    named = model.config.get_text_config()._attn_implementation == "sdpa"
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    return named and usual and model.device.type == "cpu"


@contextmanager
def _instead(function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    # Under the same name: models choose their masks by the name of their attention.
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        yield
    finally:
        # The mapping falls back to the library's own function.
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
