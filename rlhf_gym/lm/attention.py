"""Attention where PyTorch's scaled_dot_product_attention is slow.

On a CPU it is made for many queries: for the one of a decoding step it takes twice as long as two
batched matrix products, and for grouped heads transformers copies every key and value first. Its
gradient in bfloat16 takes two to three times as long as in float32 for sequences of 64 tokens, half
as long again at 128, and as long from 256 on.

On a GPU its kernels of cuDNN, which it takes in bfloat16 alone, are planned anew for every shape
that they have not met. That takes tens of milliseconds, longer than a small model's whole sampling.
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
    plain = queries == 1 and query.dtype in (torch.float32, torch.bfloat16) and not special
    if (
        not plain
        or attention_mask is None
        or not attention_mask.is_floating_point()
        or torch.is_grad_enabled()
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    # Heads of a group are as many queries of one batched product: no key is copied.
    groups = heads // key.shape[1]
    asked = query.reshape(-1, groups, width)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    mask = attention_mask.expand(n, key.shape[1], groups, -1).flatten(0, 1)
    scale = width**-0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):  # scores of bfloat16 are float32
        scores = torch.baddbmm(
            mask.float(), asked.float(), keys.float().transpose(1, 2), alpha=scale
        )
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
    """An attention function of transformers: "sdpa" in float32, whatever comes in.

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
    """What is added to attention's scores: 0, and as good as -inf where `unseen` (bool) says so."""
    mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
    return mask.masked_fill_(unseen, torch.finfo(dtype).min)


@contextmanager
def for_a_step(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model attends by `step_attention` if it would by "sdpa", on a CPU."""
    with _instead(step_attention) if _attends_by_sdpa(model) else nullcontext():
        yield


@contextmanager
def for_bfloat16(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model attends by `float32_attention` if it would by "sdpa", on a CPU.

    On a GPU without cuDNN's kernels. Not where it computes activations again in the backward pass,
    which lies outside.
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
    """Within, scaled_dot_product_attention takes another kernel than cuDNN's."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _attends_by_sdpa(model: PreTrainedModel) -> bool:
    """On a CPU, and not by what stands in for it already."""
    named = model.config.get_text_config()._attn_implementation == "sdpa"
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    return named and usual and model.device.type == "cpu"


@contextmanager
def _instead(function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    # Under the same name, which models look at and choose their masks by.
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the library's own again
