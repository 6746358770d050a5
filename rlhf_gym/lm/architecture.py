"""What a model's config and modules say about it: attention, context, cache, logits, causality."""

import inspect
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def has_full_attention(model: PreTrainedModel, width: int) -> bool:
    """Whether every layer attends to all earlier tokens in rows of `width` tokens."""
    return width <= full_attention_width(model)


def full_attention_width(model: PreTrainedModel) -> float:
    """The most tokens of a row in which every layer attends to all earlier ones; may be infinite.

    As far as the config says. A window hides nothing until a row outgrows it. 0 for a model with
    layers of another kind.
    """
    plain = (
        not has_dynamic_rope(model)
        and _layer_types(model) <= {"full_attention", *WINDOWED}
        and model.config.get_text_config()._attn_implementation in ("eager", "sdpa")
    )
    window = shortest_window(model)
    return 0 if not plain else math.inf if window is None else window


WINDOWED = ("sliding_attention", "chunked_attention")
"""transformers' names of layers that see only some of the earlier tokens."""


def shortest_window(model: PreTrainedModel) -> int | None:
    """The most tokens that every layer sees; None without a window, 0 if its length is unknown."""
    config = model.config.get_text_config()
    options = config.to_dict()
    # Qwen's configs have a sliding_window that is only used if this flag says so.
    if options.get("use_sliding_window") is False:
        return None
    windows = [
        value
        for name, value in options.items()
        if ("window" in name or name == "attention_chunk_size")
        # These count layers: every sixth is full (Gemma 3), the first 28 are (Qwen 2).
        and not ("pattern" in name or "layers" in name)
        and isinstance(value, int)
        and not isinstance(value, bool)
    ]
    derived = getattr(config, "sliding_window", None)  # not an option in ModernBERT's decoder
    if isinstance(derived, int):
        windows.append(derived)
    if not windows and _layer_types(model) & {*WINDOWED}:
        return 0
    return min(windows, default=None)


def _layer_types(model: PreTrainedModel) -> set[str]:
    return set(model.config.get_text_config().to_dict().get("layer_types") or ["full_attention"])


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


@dataclass(frozen=True)
class LogitRule:
    """What a family does to the logits after its head.

    Attributes:
        scale: Multiplies them (Cohere, Falcon-H1); Granite divides.
        soft_cap: They stay within ± this number (Gemma 2); None without a cap.
    """

    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits from the head's output."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits


def logit_rule(model: PreTrainedModel) -> LogitRule:
    """The rule for the logits that a config names; whether the model follows it is not checked."""
    options = model.config.get_text_config().to_dict()
    factors = [options.get(name) for name in ("logit_scale", "lm_head_multiplier")]
    scale = math.prod(float(factor) for factor in factors if factor is not None)
    scale /= float(options.get("logits_scaling") or 1.0)
    soft_cap = options.get("final_logit_softcapping")
    return LogitRule(scale, None if soft_cap is None else float(soft_cap))


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


CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def cache_name(model: PreTrainedModel) -> str:
    """The trunk's name for its cache: `cache` since transformers 5.24.

    Before, it was `past_key_values`, and `cache_params` for Mamba. Inputs and outputs use the same
    name.
    """
    parameters = inspect.signature(trunk(model).forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "past_key_values")


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the trunk has an input for its tokens' positions."""
    return "position_ids" in inspect.signature(trunk(model).forward).parameters


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether a token's hidden state depends on nothing to its right (an encoder's does)."""
    ids = torch.tensor([[0, 1, 0], [0, 1, 2]], device=model.device)
    hidden = trunk(model)(input_ids=ids).last_hidden_state[:, :2]
    return torch.allclose(hidden[0], hidden[1], atol=1e-4 * float(hidden.abs().max()))
