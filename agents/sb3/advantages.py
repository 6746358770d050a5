"""Advantages as pure functions of rewards: GAE with a critic, and baselines of groups without one.

Notation: N responses, T the token budget, G prompts, k responses to each. Grids are (N, T), 0 and
masked out behind each response's end. γ = 1 unless said otherwise.
"""

import torch
from torch import Tensor

WHITEN_EPSILON = 1e-8


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


def leave_one_out(returns: Tensor) -> Tensor:
    """Each response against the mean of the others to its prompt: (G, k) -> (G, k), k ≥ 2.

    The baseline does not depend on the response itself, so the gradient stays unbiased (RLOO:
    Kool et al. 2019, Ahmadian et al. 2024).
    """
    k = returns.shape[1]
    return (returns - returns.mean(1, keepdim=True)) * (k / (k - 1))


def group_mean(returns: Tensor, *, scale: bool = True) -> Tensor:
    """Each response against the mean of its group: (G, k) -> (G, k), k ≥ 2.

    Args:
        returns: Returns of k responses to each of G prompts.
        scale: Divide by the group's standard deviation, as GRPO does (Shao et al. 2024); without,
            it is Dr. GRPO's (Liu et al. 2025).
    """
    centred = returns - returns.mean(1, keepdim=True)
    return centred / (returns.std(1, keepdim=True) + 1e-4) if scale else centred


def whiten(values: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Variance 1 over all (M,) values, by the biased variance; mean 0 too unless it is kept.

    Rewards keep their mean: shifted, a score's sign would be lost (Ziegler et al. 2019).
    """
    mean = values.mean()
    whitened = (values - mean) * torch.rsqrt(values.var(correction=0) + WHITEN_EPSILON)
    return whitened if shift_mean else whitened + mean
