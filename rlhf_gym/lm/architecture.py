"""What a model's config and modules say about it: attention, context, cache, causality."""

import inspect
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel


def has_full_attention(model: PreTrainedModel) -> bool:
    """Whether every layer attends to all earlier tokens, as far as the config says."""
    config = model.config.get_text_config()
    options = config.to_dict()
    windows = [
        name
        for name, value in options.items()
        if "window" in name and isinstance(value, int) and not isinstance(value, bool)
    ]
    # Qwen's configs have a sliding_window that is only used if this flag says so.
    if options.get("use_sliding_window") is False:
        windows = []
    layer_types = options.get("layer_types") or ["full_attention"]
    return (
        not windows
        and not has_dynamic_rope(model)
        and all(kind == "full_attention" for kind in layer_types)
        and config._attn_implementation in ("eager", "sdpa")
    )


def has_dynamic_rope(model: PreTrainedModel) -> bool:
    """Whether a token's rotary embedding depends on the length of its row.

    transformers' "dynamic" and "longrope" change all frequencies once a row is longer than the
    model's original context. Cached keys then no longer match, and a state depends on tokens that
    come after it.
    """
    options = model.config.get_text_config().to_dict()
    ropes = [options.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    # Some families have one set of parameters per kind of layer (Gemma 3).
    ropes += [part for rope in ropes for part in rope.values() if isinstance(part, dict)]
    return any(rope.get("rope_type") in ("dynamic", "longrope") for rope in ropes)


def embedded(model: PreTrainedModel) -> int:
    """Number of token ids that a model embeds; often more than its tokenizer has."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that a row may have; None if the config does not say."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    # RoBERTa's family counts positions from pad_token_id + 1, so that many are never used.
    offset = model.config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl")
    return int(most) - (int(model.config.pad_token_id or 0) + 1 if offset else 0)


def trunk(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    return model.base_model


def recompute_activations(model: PreTrainedModel, on: bool) -> None:
    """Switch gradient checkpointing: in training mode the backward pass recomputes each layer."""
    # transformers is renaming these methods; both names are in use in the versions we support.
    name = "enable" if on else "disable"
    newer = getattr(model, f"activation_checkpointing_{name}", None)
    switch = newer or getattr(model, f"gradient_checkpointing_{name}")
    switch(*([{"use_reentrant": False}] if on else []))


def recomputes_activations(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on; it takes effect in training mode only."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def cache_name(model: PreTrainedModel) -> str:
    """The trunk's name for its cache: `cache` since transformers 5.24, `past_key_values` before.

    Inputs and outputs use the same name.
    """
    parameters = inspect.signature(trunk(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether a token's hidden state depends on nothing to its right (an encoder's does)."""
    ids = torch.tensor([[0, 1, 0], [0, 1, 2]], device=model.device)
    hidden = trunk(model)(input_ids=ids).last_hidden_state[:, :2]
    return torch.allclose(hidden[0], hidden[1], atol=1e-4 * float(hidden.abs().max()))
