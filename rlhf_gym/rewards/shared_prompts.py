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
    looks_plain,
    recomputes_activations,
    trunk,
)
from rlhf_gym.tokens import PAD, continuations, model_ids, row_lengths

logger = logging.getLogger(__name__)


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
        model: One that passes `shares_prefix`.
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
    cache.batch_select_indices(owners)
    columns = torch.arange(candidates.shape[1], device=candidates.device)
    # Behind a short prompt stands padding that no candidate may look at; its own padding is
    # always to its right.
    mask = torch.cat([(prompts != PAD)[owners], torch.ones_like(candidates, dtype=torch.bool)], 1)
    second = trunk(model)(
        input_ids=model_ids(candidates),
        **{name: cache},
        attention_mask=mask.long(),  # (B, P + C)
        # (B, C); padding stays at the last position, for one beyond the context may not exist.
        position_ids=lengths[owners][:, None] + torch.minimum(columns, ends[:, None] - 1),
        use_cache=True,
    ).last_hidden_state
    return second[torch.arange(len(candidates), device=ends.device), ends - 1]  # type: ignore[no-any-return]


_shares: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def shares_prefix(model: PreTrainedModel) -> bool:
    """Whether `last_states_after` is exact for this model: no window, and a probe agrees."""
    if model not in _shares:
        _shares[model] = looks_plain(model) and _probe_agrees(model)
        if not _shares[model]:
            logger.warning(
                "%s cannot continue one prompt by several candidates; prompts are repeated",
                type(model).__name__,
            )
    # A recomputed layer may not read a cache that later layers have filled.
    return _shares[model] and not recomputes_activations(model)


@torch.no_grad()
def _probe_agrees(model: PreTrainedModel) -> bool:
    """Two prompts of different lengths, two candidates each, both ways."""
    ids = torch.arange(1, 9, device=model.device)
    vocab = embedded(model)
    prompts = torch.stack([ids[:4], ids[2:6]]) % vocab
    candidates = torch.stack([ids[i : i + 3] for i in (4, 1, 5, 0)]) % vocab
    prompts[1, 2:] = PAD
    candidates[2, 1:] = PAD
    sizes = torch.tensor([2, 2], device=model.device)
    model_training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, enabled=False):
            shared = last_states_after(model, prompts, candidates, sizes)
            plain = last_states(model, repeated(prompts, candidates, sizes))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        model.train(model_training)
    return torch.allclose(shared, plain, atol=1e-3 * float(plain.abs().max()), rtol=1e-3)


def repeated(prompts: Tensor, candidates: Tensor, sizes: Tensor) -> Tensor:
    """Each prompt followed by each of its candidates: (N, P) and (B, C) -> (B, P + C)."""
    return continuations(prompts[torch.repeat_interleave(sizes)], candidates).tokens
