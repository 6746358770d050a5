"""Load transformers' models and tokenizers, checked and prepared for log-probs that repeat."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import FastGELUActivation, NewGELUActivation

from rlhf_gym.errors import InputError, UnreachableError
from rlhf_gym.lm.sources import UNLOADABLE, check_source, refusal, source_options

HEADS = (
    *("score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "lm_head"),
    *("logits_proj", "sequence_summary", "pooler"),
)
"""Parts of transformers' models that are new where a classifier is made of another model."""


def disable_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout probability of a model's config to 0.

    With dropout on, `train()` would change the log-probs, and PPO's first ratio would not be 1.
    """
    for name, value in vars(config).items():
        is_dropout = any(word in name for word in ("dropout", "pdrop", "layerdrop"))
        if is_dropout and isinstance(value, float | int) and not isinstance(value, bool):
            setattr(config, name, 0.0)


def load_pretrained(
    auto_class: Any,
    name: str,
    *,
    revision: str | None = None,
    attn_implementation: str | None = None,
    new_head: bool = False,
    **config_options: Any,
) -> PreTrainedModel:
    """Load a float32 model by hub name or local path, dropout off, in eval mode.

    Args:
        auto_class: `AutoModelForCausalLM` or another auto class of transformers.
        name: Hub name, or path of a folder that `save_pretrained` wrote.
        revision: Commit or tag on the hub; pin it to make results repeatable.
        attn_implementation: As in transformers; None leaves the choice to it.
        new_head: Whether the head may be new, that is random, because it is about to be trained.
            All other weights must be there, with their shapes.
        **config_options: Entries of the model's config to set, such as `num_labels`.

    Raises:
        UnreachableError: The model cannot be loaded.
        InputError: Its weights are damaged, do not fit its config, are not all there, or are not
            finite; or the folder is none of a whole model.
    """
    config = load_config(name, revision=revision, **config_options)
    disable_dropout(config)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model, loaded = auto_class.from_pretrained(
            name,
            config=config,
            # Whatever was saved: PPO's ratios and small updates need float32 weights.
            dtype=torch.float32,
            use_safetensors=True,  # the other format is a pickle, which runs a stranger's code
            ignore_mismatched_sizes=True,  # `_check_whole` refuses those, by name
            output_loading_info=True,
            **source_options(name, revision),
            **options,
        )
    except SafetensorError as error:
        raise InputError(
            f"the weights of {name!r} are damaged: {error}; copy or download the folder again"
        ) from error
    except UNLOADABLE as error:
        raise refusal(name, error) from error
    _check_whole(name, model, loaded, new_head)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _fuse_gelu(model)
    return model.eval()  # type: ignore[no-any-return]


def load_config(name: str, *, revision: str | None = None, **options: Any) -> PreTrainedConfig:
    """Load a model's config by hub name or local path.

    Args:
        name: As in `load_pretrained`.
        revision: Commit or tag on the hub.
        **options: Entries to set, such as `num_labels`.

    Raises:
        UnreachableError: There is none.
        InputError: The path is not a model's folder, or the model is an encoder-decoder, is
            quantized or needs code of its own.
    """
    check_source(name)
    try:
        config = AutoConfig.from_pretrained(name, **source_options(name, revision), **options)
    except UNLOADABLE as error:
        raise refusal(name, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"{name!r} is an encoder-decoder ({config.model_type}); take a model of one stack, "
            "such as a causal language model"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"the weights of {name!r} are quantized, and training needs them in full precision; "
            "take the model that it was made from"
        )
    return config  # type: ignore[no-any-return]


def _check_whole(name: str, model: PreTrainedModel, loaded: dict[str, Any], new_head: bool) -> None:
    """Check that all weights were there, with their shapes, and finite.

    Raises:
        InputError: A weight other than a new head's is not.
    """
    # transformers makes up a weight that is missing or has another shape.
    misfits = [str(key[0]) for key in loaded["mismatched_keys"]]
    misfits = [key for key in misfits if not (new_head and _of_head(key))]
    if misfits:
        raise InputError(
            f"the weights of {name!r} do not fit its config.json: {_listed(misfits)} have another "
            "shape; fix the config, or take the model's own"
        )
    missing = [str(key) for key in loaded["missing_keys"]]
    missing = sorted(key for key in missing if not (new_head and _of_head(key)))
    if missing:
        extra = sorted(map(str, loaded["unexpected_keys"]))
        wrapped = [key for key in extra if any(key.endswith(f".{lost}") for lost in missing)]
        hint = f"; the file has {_listed(extra)} instead" if extra else ""
        if wrapped:
            hint += ": it was saved through a wrapper, so save the model inside it"
        raise InputError(
            f"{name!r} lacks weights of a {type(model).__name__}, which would be random: "
            f"{_listed(missing)}{hint}"
        )
    for key, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise InputError(
                f"the weight {key} of {name!r} has a NaN or an infinity: the training that saved "
                "it diverged; take an earlier checkpoint"
            )


def _of_head(key: str) -> bool:
    return any(f".{head}." in f".{key}" for head in HEADS)


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more


def _fuse_gelu(model: PreTrainedModel) -> None:
    """Compute GPT-2's activation in one operation instead of eight; the same up to rounding.

    On a CPU the eight take longer than the matrix product before them.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub name or local path.

    Raises:
        UnreachableError: There is none.
        InputError: The path is not a folder, or the tokenizer needs code of its own.
    """
    check_source(name, what="a tokenizer from")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **source_options(name, revision))
    except UNLOADABLE as error:
        raise refusal(name, error, what="a tokenizer from") from error
    # Without its files some classes load with their special tokens only, and raise nothing.
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_tokens)):
        raise UnreachableError(
            f"{name!r} has no tokenizer files; give the tokenizer that belongs to the model"
        )
    return tokenizer


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same tokens under the same ids."""
    return bool(one.get_vocab() == other.get_vocab())


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response: from the generation config, else the config or the tokenizer.

    Raises:
        InputError: None of the three names one.
    """
    # First the generation config, as `generate` does: chat models list more ends there (Llama 3's
    # <|eot_id|>) than their config or tokenizer names.
    generation = getattr(model, "generation_config", None)
    for holder in (generation, model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return tuple(sorted({ids} if isinstance(ids, int) else set(ids)))
    raise InputError(
        f"the model {model.name_or_path!r} has no eos_token_id, so its responses could never end; "
        "set it in its generation_config.json"
    )


def name_eos(tokenizer: PreTrainedTokenizerBase, eos_ids: tuple[int, ...]) -> None:
    """Give a tokenizer that names no EOS the model's first one, so that answers are closed by it.

    Raises:
        InputError: None of the ids is a token of the tokenizer, so no response could end.
    """
    names = [tokenizer.convert_ids_to_tokens(i) for i in eos_ids if 0 <= i < len(tokenizer)]
    names = [name for name in names if name is not None]
    if not names:
        raise InputError(
            f"the model's responses end at the ids {list(eos_ids)}, but the tokenizer of "
            f"{tokenizer.name_or_path!r} has no such tokens, so none could end; set eos_token_id "
            "in the model's generation_config.json to an id of this tokenizer"
        )
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = names[0]


def vocabulary_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """V: the number of the model's logits that the tokenizer has tokens for.

    Embeddings are often padded to a round size; ids beyond the tokenizer's have no text.

    Raises:
        InputError: The tokenizer has ids that the model cannot embed.
    """
    head = model.get_output_embeddings()
    named = max(tokenizer.get_vocab().values()) + 1
    if named > head.weight.shape[0]:
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has ids up to {named - 1}, but the model "
            f"{model.name_or_path!r} has {head.weight.shape[0]} logits; use the tokenizer that "
            "belongs to the model, or resize its embeddings"
        )
    return named


def load_causal_lm(
    name: str, *, revision: str | None = None, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A causal LM in float32, dropout off, in eval mode (see `load_pretrained`).

    Raises:
        InputError: Some of its weights are missing (a classifier's folder has no language head).
    """
    return load_pretrained(
        AutoModelForCausalLM,
        name,
        revision=revision,
        attn_implementation=attn_implementation,
    )


def commit(model: PreTrainedModel) -> str | None:
    """The hub commit that a model was loaded from; None for a local one."""
    found: str | None = getattr(model.config, "_commit_hash", None)
    return found


def weights_stamp(name: str) -> int:
    """When a local folder's weights were last written (0 for a hub name); part of a cache key."""
    return max((f.stat().st_mtime_ns for f in Path(name).glob("*.safetensors")), default=0)
