"""What can be said of a model from its config and modules."""

import inspect
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel


def has_full_attention(model: PreTrainedModel) -> bool:
    """Whether every layer attends to everything before it, as far as the config says."""
    config = model.config.get_text_config()
    options = config.to_dict()
    windows = [
        name
        for name, value in options.items()
        if "window" in name and isinstance(value, int) and not isinstance(value, bool)
    ]
    # Qwen names a window that it does not use.
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
    """Whether a token's rotary embedding depends on how long its row is.

    What a state says then changes with the tokens behind it, once a row is longer than those that
    the model was first trained on.
    """
    options = model.config.get_text_config().to_dict()
    ropes = [options.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    # By kind of layer, in some families.
    ropes += [part for rope in ropes for part in rope.values() if isinstance(part, dict)]
    return any(rope.get("rope_type") in ("dynamic", "longrope") for rope in ropes)


def embedded(model: PreTrainedModel) -> int:
    """How many token ids a model embeds; at least as many as its tokenizer names."""
    return cast(nn.Embedding, model.get_input_embeddings()).num_embeddings


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that a row may have; None where nothing says."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None:
        return None
    # RoBERTa and its kin number positions from behind the pad id.
    kin = model.config.model_type in ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl")
    return int(most) - (int(model.config.pad_token_id or 0) + 1 if kin else 0)


def trunk(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    return model.base_model


def recompute_activations(model: PreTrainedModel, on: bool) -> None:
    """Whether the backward pass of a model in training mode recomputes what it needs of a layer."""
    # transformers is renaming its methods for it.
    name = "enable" if on else "disable"
    newer = getattr(model, f"activation_checkpointing_{name}", None)
    switch = newer or getattr(model, f"gradient_checkpointing_{name}")
    switch(*([{"use_reentrant": False}] if on else []))


def recomputes_activations(model: PreTrainedModel) -> bool:
    """What `recompute_activations` has set; it takes effect in training mode alone."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def cache_name(model: PreTrainedModel) -> str:
    """What the trunk calls its cache: `cache` from transformers 5.24 on, before `past_key_values`.

    Its inputs and its outputs have it under the same name.
    """
    parameters = inspect.signature(trunk(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether a token's hidden state depends on nothing to its right (an encoder's does)."""
    ids = torch.tensor([[0, 1, 0], [0, 1, 2]], device=model.device)
    hidden = trunk(model)(input_ids=ids).last_hidden_state[:, :2]
    return torch.allclose(hidden[0], hidden[1], atol=1e-4 * float(hidden.abs().max()))
