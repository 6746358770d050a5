"""Advantages as pure functions of rewards: GAE with a critic, and baselines of groups without one.

Notation: N responses, T the token budget, G prompts, k responses to each. Grids are (N, T), 0 and
masked out behind each response's end. γ = 1 unless said otherwise.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agents.sb3.options import Baseline, NormalizeOver
from agents.sb3.rollout.buffer import SequenceRolloutBuffer
from rlhf_gym.errors import InputError
from rlhf_gym.tokens import PAD

WHITEN_EPSILON = 1e-8
ROUNDING = 1e-5
"""Returns whose spread is below this, or this share of the largest, count as equal.

A return is a score and a sum of log-ratios in float32. Divided by its own spread, the rounding of
equal returns would become advantages of 1; and Adam turns any gradient into steps of full length.
A reward whose differences are that small must be scaled up to be learned.
"""


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over whole responses (Schulman et al. 2016).

    Args:
        rewards: (N, T) of each token.
        values: (N, T) of the state in which each token was chosen.
        mask: (N, T) bool, the tokens that there are.
        gae_lambda: λ.
        gamma: γ.

    Returns:
        Advantages and returns (advantage + value), (N, T) each, 0 behind the end.
    """
    advantages = torch.zeros_like(rewards)
    following = rewards.new_zeros(len(rewards))  # the advantage of the next token
    next_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        here = delta + gamma * gae_lambda * following
        # Behind the end nothing has a value and nothing follows.
        following = torch.where(mask[:, t], here, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = following
    return advantages, torch.where(mask, advantages + values, 0.0)


def are_equal(returns: Tensor, dim: int = -1) -> Tensor:
    """Whether returns differ by no more than rounding, along `dim`, which is kept: bool."""
    most, least = returns.amax(dim, keepdim=True), returns.amin(dim, keepdim=True)
    largest = returns.abs().amax(dim, keepdim=True)
    return most - least <= ROUNDING * largest.clamp(min=1.0)


def _centred(returns: Tensor) -> Tensor:
    """Each return minus its group's mean, exactly 0 where all are equal: (G, k) -> (G, k)."""
    # In float64: the mean of k equal float32 numbers need not be that number.
    centred = (returns.double() - returns.double().mean(1, keepdim=True)).to(returns.dtype)
    return centred.masked_fill(are_equal(returns), 0.0)


def leave_one_out(returns: Tensor) -> Tensor:
    """Each response against the mean of the others to its prompt: (G, k) -> (G, k), k ≥ 2.

    The baseline does not depend on the response itself, so the gradient stays unbiased (RLOO:
    Kool et al. 2019, Ahmadian et al. 2024).
    """
    k = returns.shape[1]
    return _centred(returns) * (k / (k - 1))


def group_mean(returns: Tensor, *, scale: bool = True) -> Tensor:
    """Each response against the mean of its group: (G, k) -> (G, k), k ≥ 2.

    Args:
        returns: Returns of k responses to each of G prompts.
        scale: Divide by the group's standard deviation, as GRPO does (Shao et al. 2024); without,
            it is Dr. GRPO's (Liu et al. 2025).
    """
    centred = _centred(returns)
    return centred / (returns.std(1, keepdim=True) + 1e-4) if scale else centred


def whiten(values: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Variance 1 over all (M,) values, by the biased variance; mean 0 too unless it is kept.

    Rewards keep their mean: shifted, a score's sign would be lost (Ziegler et al. 2019).
    """
    mean = values.mean()
    whitened = (values - mean) * torch.rsqrt(values.var(correction=0) + WHITEN_EPSILON)
    return whitened if shift_mean else whitened + mean


@dataclass(frozen=True)
class AdvantageEstimator:
    """What a token's advantage is.

    Attributes:
        baseline: What advantages are taken against: the "critic" (GAE); the other responses to the
            prompt ("leave_one_out", "group_mean": the advantage is the whole response's, at each
            of its tokens); or "none", the rewards to come alone.
        gae_lambda: λ of GAE.
        critic_lambda: λ of the returns that the critic learns.
        scale_by_std: Whether "group_mean" divides by the group's standard deviation.
        whiten_rewards: Whether rewards are given variance 1 first, their mean kept.
        whiten_over: Where advantages are whitened: here, over the "rollout"; later, over each
            "minibatch"; None for nowhere.
    """

    baseline: Baseline
    gae_lambda: float
    critic_lambda: float
    scale_by_std: bool
    whiten_rewards: bool
    whiten_over: NormalizeOver | None

    def estimate(self, buffer: SequenceRolloutBuffer, waves: int, rows_per_prompt: int) -> None:
        """Fill in a buffer's advantages and returns from its rewards and values.

        Args:
            buffer: Holds `waves` whole waves.
            waves: W.
            rows_per_prompt: k.

        Raises:
            InputError: The baseline compares responses to a prompt, and there is but one.
        """
        taken = buffer.actions >= 0
        if self.whiten_rewards:
            buffer.rewards[taken] = _whitened(buffer.rewards[taken], shift_mean=False)
        if self.baseline == "critic":
            self._gae(buffer, waves)
        elif self.baseline == "none":
            by_wave = buffer.rewards.reshape(waves, -1, buffer.n_envs)
            to_come = by_wave[:, ::-1].cumsum(1)[:, ::-1].reshape(taken.shape)
            buffer.advantages = np.where(taken, to_come, 0)
        else:
            if rows_per_prompt < 2:
                raise InputError(
                    f"baseline={self.baseline!r} compares responses to one prompt: make the "
                    "environment with rows_per_prompt of at least 2, or give samples_per_prompt"
                )
            buffer.advantages = np.where(taken, self._compared(buffer, waves, rows_per_prompt), 0)
        if self.whiten_over is not None and self._all_equal(buffer, waves):
            # No response was better than another. What is left is the critic's error, which
            # whitening would raise to the size of a signal.
            buffer.advantages[:] = 0
        elif self.whiten_over == "rollout":
            buffer.advantages[taken] = _whitened(buffer.advantages[taken], shift_mean=True)

    def _all_equal(self, buffer: SequenceRolloutBuffer, waves: int) -> bool:
        """Whether all of several responses have the same return, up to rounding."""
        returns = buffer.rewards.reshape(waves, -1, buffer.n_envs).sum(1).reshape(-1)
        return len(returns) > 1 and bool(are_equal(torch.from_numpy(returns)))

    def _gae(self, buffer: SequenceRolloutBuffer, waves: int) -> None:
        """GAE, and the critic's returns by its own λ."""

        def by_response(grid: npt.NDArray[Any]) -> torch.Tensor:
            """(W · T, N) to (W · N, T)."""
            return torch.from_numpy(grid.reshape(waves, -1, buffer.n_envs)).mT.flatten(0, 1)

        def by_step(rows: torch.Tensor) -> npt.NDArray[np.floating]:
            grid: npt.NDArray[np.floating] = rows.unflatten(0, (waves, -1)).mT.flatten(0, 1).numpy()
            return grid

        mask = by_response(buffer.actions) != PAD
        rewards, values = by_response(buffer.rewards), by_response(buffer.values)
        advantages, returns = gae(rewards, values, mask, self.gae_lambda)
        if self.gae_lambda != self.critic_lambda:
            _, returns = gae(rewards, values, mask, self.critic_lambda)
        buffer.advantages, buffer.returns = by_step(advantages), by_step(returns)

    def _compared(
        self, buffer: SequenceRolloutBuffer, waves: int, rows_per_prompt: int
    ) -> npt.NDArray[np.floating]:
        """Each response against the others to its prompt, on the grid (W · T, N)."""
        responses = buffer.rewards.reshape(waves, -1, buffer.n_envs).sum(1)
        groups = torch.from_numpy(responses.reshape(-1, rows_per_prompt))
        if self.baseline == "leave_one_out":
            against = leave_one_out(groups)
        else:
            against = group_mean(groups, scale=self.scale_by_std)
        steps = buffer.buffer_size // waves
        rows = against.numpy().reshape(waves, 1, buffer.n_envs)
        grid: npt.NDArray[np.floating] = np.repeat(rows, steps, 1).reshape(buffer.rewards.shape)
        return grid


def _whitened(values: npt.NDArray[np.floating], *, shift_mean: bool) -> npt.NDArray[np.floating]:
    white: npt.NDArray[np.floating]
    white = whiten(torch.from_numpy(values), shift_mean=shift_mean).numpy()
    return white
