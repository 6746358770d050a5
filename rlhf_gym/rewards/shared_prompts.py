"""Candidates that share a prompt: the prompt's keys and values are computed once.

Notation: N prompts, P columns; B candidates over all prompts, C columns; d the trunk's width.
"""

import logging
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_gym.lm.architecture import (
    cache_name,
    embedded,
    has_full_attention,
    recomputes_activations,
    trunk,
)
from rlhf_gym.lm.batching import layer_operations
from rlhf_gym.lm.probe import agrees
from rlhf_gym.tokens import PAD, continuations, model_ids, row_lengths

logger = logging.getLogger(__name__)

# Sharing a prompt takes a second call of the trunk, so it must save at least a tenth of the work.
MAX_SHARE = 0.9


def last_states(model: PreTrainedModel, rows: Tensor) -> Tensor:
    """Hidden state at each row's last real token, by one plain pass: (B, L) -> (B, d)."""
    lengths = row_lengths(rows)
    rows = rows[:, : max(int(lengths.max()), 1)]
    hidden = trunk(model)(input_ids=model_ids(rows), use_cache=False).last_hidden_state
    return hidden[torch.arange(len(rows), device=rows.device), lengths - 1]  # type: ignore[no-any-return]


def last_states_after(
    model: PreTrainedModel, prompts: Tensor, candidates: Tensor, sizes: Tensor
) -> Tensor:
    """Hidden state at each candidate's last token, every prompt computed once; has a gradient.

    Args:
        model: A model for which `can_share_prompts` is true.
        prompts: (N, P) right-padded with PAD, none empty.
        candidates: (B, C) right-padded with PAD, none empty, prompt after prompt.
        sizes: (N,) int64, candidates of each prompt; B = sizes.sum().

    Returns:
        (B, d).
    """
    owners = torch.repeat_interleave(sizes)
    lengths, ends = row_lengths(prompts), row_lengths(candidates)
    prompts = prompts[:, : int(lengths.max())]
    candidates = candidates[:, : int(ends.max())]
    first = trunk(model)(input_ids=model_ids(prompts), use_cache=True)
    name = cache_name(model)
    cache = first[name]
    # Indexing copies keys and values with their graph, so the prompt gets the gradients of all its
    # candidates.
    cache.batch_select_indices(owners)
    columns = torch.arange(candidates.shape[1], device=candidates.device)
    # A short prompt is followed by padding in the middle of the row; candidates must not attend to
    # it. Padding after a candidate is to the right of its tokens, where causal attention never
    # looks.
    mask = torch.cat([(prompts != PAD)[owners], torch.ones_like(candidates, dtype=torch.bool)], 1)
    second = trunk(model)(
        input_ids=model_ids(candidates),
        **{name: cache},
        attention_mask=mask.long(),  # (B, P + C)
        # (B, C). Padding repeats the last position: the next one may be beyond the context.
        position_ids=lengths[owners][:, None] + torch.minimum(columns, ends[:, None] - 1),
        use_cache=True,
    ).last_hidden_state
    return second[torch.arange(len(candidates), device=ends.device), ends - 1]  # type: ignore[no-any-return]


def sharing_pays(model: PreTrainedModel, prompts: Tensor, candidates: Tensor) -> bool:
    """Whether to compute each of these prompts once: it is exact, and it saves work.

    Args:
        model: A causal classifier.
        prompts: (N, P) right-padded with PAD.
        candidates: (B, C) right-padded with PAD.
    """
    n, p = prompts.shape
    b, c = candidates.shape
    # With a shared prompt a candidate's tokens attend to all columns; in a plain row each token
    # attends to half of them on average.
    plain = layer_operations(model, b * (p + c), b * (p + c) ** 2 / 2)
    shared = layer_operations(model, n * p + b * c, n * p**2 / 2 + b * c * (p + c))
    empty = bool((row_lengths(prompts) == 0).any() or (row_lengths(candidates) == 0).any())
    return shared <= MAX_SHARE * plain and not empty and can_share_prompts(model, p + c)


_can_share: WeakKeyDictionary[PreTrainedModel, dict[bool, bool]] = WeakKeyDictionary()


def can_share_prompts(model: PreTrainedModel, width: int) -> bool:
    """Whether `last_states_after` is exact for this model: full attention, and a probe agrees.

    Args:
        model: A causal classifier.
        width: Columns of prompt and candidate together; a window must not be shorter.
    """
    known = _can_share.setdefault(model, {})
    plain = has_full_attention(model, width)
    if plain not in known:
        known[plain] = plain and _probe_agrees(model)
        if not known[plain]:
            logger.warning(
                "%s cannot continue one prompt by several candidates; prompts are repeated",
                type(model).__name__,
            )
    # A layer that the backward pass recomputes would append to the cache a second time.
    return known[plain] and not recomputes_activations(model)


def _probe_agrees(model: PreTrainedModel) -> bool:
    """Two prompts of different lengths, two candidates each, both ways."""
    ids = torch.arange(1, 9, device=model.device)
    vocab = embedded(model)
    prompts = torch.stack([ids[:4], ids[2:6]]) % vocab
    candidates = torch.stack([ids[i : i + 3] for i in (4, 1, 5, 0)]) % vocab
    prompts[1, 2:] = PAD
    candidates[2, 1:] = PAD
    sizes = torch.tensor([2, 2], device=model.device)
    with torch.autocast(model.device.type, enabled=False):
        return agrees(
            model,
            lambda: last_states_after(model, prompts, candidates, sizes),
            lambda: last_states(model, repeat_prompts(prompts, candidates, sizes)),
        )


def repeat_prompts(prompts: Tensor, candidates: Tensor, sizes: Tensor) -> Tensor:
    """Each prompt followed by each of its candidates: (N, P) and (B, C) -> (B, P + C)."""
    return continuations(prompts[torch.repeat_interleave(sizes)], candidates).tokens
