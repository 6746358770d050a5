"""The actions of a step and of whole responses, checked. Notation: N rows, T the token budget."""

from typing import Any

import numpy as np

from rlhf_gym.errors import InputError
from rlhf_gym.tokens import PAD, row_lengths
from rlhf_gym.utils.arrays import Ints


def checked_actions(actions: Any, num_envs: int, vocab_size: int) -> Ints:
    """One token id per row, (N,) int64.

    Raises:
        InputError: They are not.
    """
    actions = np.asarray(actions)
    whole = actions.shape == (num_envs,) and np.issubdtype(actions.dtype, np.integer)
    if not whole or (actions < 0).any() or (actions >= vocab_size).any():
        raise InputError(
            f"actions must be ({num_envs},) integers from 0 to {vocab_size - 1}, not {actions!r}"
        )
    checked: Ints = actions.astype(np.int64)
    return checked


def whole_responses(actions: Any, num_envs: int, budget: int, vocab_size: int, eos: Ints) -> Ints:
    """One whole response per row, (N, at most T) int64, PAD after its end.

    Args:
        actions: The token ids.
        num_envs: N.
        budget: T.
        vocab_size: Ids from 0 to this are tokens.
        eos: The ids that end a response.

    Raises:
        InputError: A row is not exactly one whole response.
    """
    actions = np.asarray(actions)
    whole = actions.ndim == 2 and np.issubdtype(actions.dtype, np.integer)
    if not whole or len(actions) != num_envs or not 0 < actions.shape[1] <= budget:
        raise InputError(
            f"play takes ({num_envs}, T ≤ {budget}) token ids, not {actions.dtype} {actions.shape}"
        )
    lengths = row_lengths(actions)
    columns = np.arange(actions.shape[1])
    is_eos = np.isin(actions, eos)
    inside = columns < lengths[:, None]
    early = (is_eos & (columns < lengths[:, None] - 1)).any(1)
    last = actions[np.arange(len(actions)), np.maximum(lengths - 1, 0)]
    unfinished = ~np.isin(last, eos) & (lengths < budget)
    in_range = (actions < vocab_size) & (actions >= 0)
    broken = (inside != in_range).any(1) | early | unfinished | (lengths == 0)
    if broken.any():
        raise InputError(
            f"rows {np.flatnonzero(broken).tolist()} are not one whole response each: token ids "
            f"up to an EOS or to the budget of {budget}, then PAD = {PAD}"
        )
    responses: Ints = actions.astype(np.int64)
    return responses
