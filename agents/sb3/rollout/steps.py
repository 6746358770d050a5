"""A wave of whole responses as the steps of a batch that callbacks and watching wrappers expect.

The responses of a wave end at different times, so its later positions have fewer tokens than rows.
A step here covers one or more whole positions, so that M tokens in N rows are M / N steps, as if
every row acted in every step. Where all responses are equally long, a step is one position.
Notation: N rows, T the token budget, L columns of an observation.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from agents.sb3.rollout.collection import Wave
from rlhf_gym.tokens import PAD, row_lengths
from rlhf_gym.utils.arrays import Bools, Ints

ALONG = ("ref_log_prob", "kl")
"""Infos of every token."""
ENDS = ("score", "score_std", "kl_sum", "finish_reason", "prompt", "response")
"""Infos of a response that has ended."""


class BatchStep(NamedTuple):
    """What happened in some positions of a wave.

    Attributes:
        n_tokens: Tokens of all rows.
        taken: (N,) tokens of each row; 0 where its response has ended before.
        actions: (N,) the last of them, or PAD.
        observations: (N, L) after them; the next prompt where the response has ended.
        rewards: (N,) float32, the sum over them.
        dones: (N,) whether the response ended with them.
        infos: One dict per row: what `step` says of the last of them; at the end of a response also
            `terminal_observation` and `episode`, as `TokenSB3VecEnv` has them.
    """

    n_tokens: int
    taken: Ints
    actions: Ints
    observations: Ints
    rewards: npt.NDArray[np.float32]
    dones: Bools
    infos: list[dict[str, Any]]


def batch_steps(wave: Wave, tokens_before: int, begun: float) -> Iterator[BatchStep]:
    """The steps of a wave.

    Args:
        wave: The wave.
        tokens_before: Tokens of the waves before it.
        begun: When the training began, in seconds since the epoch.
    """
    lengths: Ints = (wave.actions != PAD).sum(1)
    n, total = len(lengths), int(lengths.sum())
    shown, first = wave.before.copy(), 0
    starts = row_lengths(shown)
    for last in _cuts(lengths, (tokens_before + total) // n - tokens_before // n):
        actions = wave.actions[:, first:last]
        taken: Ints = (actions != PAD).sum(1)
        rows, columns = np.nonzero(actions != PAD)
        shown[rows, starts[rows] + first + columns] = actions[rows, columns]
        infos = _along(wave, first + taken - 1, taken > 0)
        dones = (lengths > first) & (lengths <= last)
        for i in np.flatnonzero(dones).tolist():
            ends = {key: wave.infos[key][i] for key in ENDS if key in wave.infos}
            paid = float(wave.rewards[i].sum())
            infos[i] |= ends | end_of_episode(shown[i].copy(), paid, int(lengths[i]), begun)
        shown[dones] = wave.observations[dones]
        yield BatchStep(
            n_tokens=int(taken.sum()),
            taken=taken,
            actions=np.where(taken > 0, actions[np.arange(n), np.maximum(taken - 1, 0)], PAD),
            observations=shown.copy(),
            rewards=wave.rewards[:, first:last].sum(1).astype(np.float32),
            dones=dones,
            infos=infos,
        )
        first = last


def _cuts(lengths: Ints, parts: int) -> list[int]:
    """The position behind each of `parts` steps of about equally many tokens."""
    longest = int(lengths.max())
    tokens = np.cumsum((lengths[:, None] > np.arange(longest)).sum(0))  # up to each position
    cuts: list[int] = []
    for part in range(1, parts + 1):
        wanted = int(np.searchsorted(tokens, tokens[-1] * part / parts)) + 1
        # Every step has a position, and leaves one to each step after it.
        earliest = cuts[-1] + 1 if cuts else 1
        cuts.append(min(max(wanted, earliest), longest - (parts - part)))
    return cuts


def _along(wave: Wave, places: Ints, acting: Bools) -> list[dict[str, Any]]:
    """What `step` says of the token at `places` (N,) of each row that acts."""
    rows = np.arange(len(places))
    columns = [wave.infos[key][rows, places].tolist() for key in ALONG if key in wave.infos]
    if len(columns) < len(ALONG):  # responses that no environment has played
        return [{} for _ in rows]
    return [
        {"ref_log_prob": log_prob, "kl": kl, "actor_bound": True} if acts else {}
        for log_prob, kl, acts in zip(*columns, acting.tolist(), strict=True)
    ]


def end_of_episode(observation: Ints, total: float, length: int, begun: float) -> dict[str, Any]:
    """What Stable-Baselines3 puts into the info of a row whose episode has ended.

    Args:
        observation: (L,) the last one.
        total: The sum of the rewards.
        length: Tokens of the response.
        begun: The start of the clock, in seconds since the epoch.
    """
    return {
        "terminal_observation": observation,
        "TimeLimit.truncated": False,
        "episode": {"r": total, "l": length, "t": round(time.time() - begun, 6)},
    }
