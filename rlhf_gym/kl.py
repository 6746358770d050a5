"""Estimators of a KL divergence, and controllers of its weight.

Source of k1, k2 and k3: J. Schulman, "Approximating KL Divergence" (2020),
http://joschu.net/blog/kl-approx.html.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from torch import Tensor

from rlhf_gym.errors import InputError

RewardEstimator = Literal["k1", "k2", "k3"]


def k1(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Log p − log q of tokens drawn from p: unbiased for KL(p ‖ q), of either sign.

    In a reward it is the only estimator whose expected gradient is that of −KL.

    Args:
        log_probs: log p of each token, any shape.
        other_log_probs: log q of the same tokens.

    Returns:
        Nats for each token, the same shape.
    """
    return log_probs - other_log_probs


def k2(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """(log p − log q)² / 2 of tokens drawn from p: biased, never negative, exact to second order.

    As a loss on p its expected gradient is that of KL(p ‖ q), for tokens drawn from p itself.

    Args:
        log_probs: log p of each token, any shape.
        other_log_probs: log q of the same tokens.

    Returns:
        Nats for each token, the same shape.
    """
    return (log_probs - other_log_probs) ** 2 / 2


def k3(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """(ρ − 1) − log ρ with ρ = q/p, of tokens drawn from p: unbiased for KL(p ‖ q), never negative.

    As a loss on q its gradient is unbiased for the gradient of KL(p ‖ q) with respect to q, which
    is what PPO's penalty on the last iterate needs: p = π_old, q = π_θ.

    Args:
        log_probs: log p of each token, any shape.
        other_log_probs: log q of the same tokens.

    Returns:
        Nats for each token, the same shape.
    """
    log_ratio = other_log_probs - log_probs
    return log_ratio.expm1() - log_ratio


def exact_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of normalised distributions over V tokens: two (…, V) -> (…), at least 0.

    A token that p never takes costs nothing, even where q never takes it either.
    """
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p.isneginf(), 0.0).sum(-1).clamp(min=0.0)


REWARD_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""What may estimate the penalty in a reward; all but k1 miss J*."""


class KLController(Protocol):
    """Chooses the weight of an agent's KL penalty from what its episodes cost.

    Attributes:
        kl_coef: The weight now.
    """

    kl_coef: float

    def update(self, kl: float, episodes: int) -> None:
        """Take in the mean KL(π ‖ π_ref), in nats a sequence, of so many episodes."""
        ...


def check_first_weight(kl_coef: float) -> None:
    """Raise an InputError if a controller that multiplies could never move this weight."""
    if not kl_coef > 0:
        raise InputError(
            f"a controller of the KL penalty multiplies its weight, so {kl_coef} would never "
            "change; set kl_coef above 0, or kl_control=fixed"
        )


class FixedKL:
    """Always the same weight.

    Args:
        kl_coef: The weight.
    """

    def __init__(self, kl_coef: float) -> None:
        self.kl_coef = kl_coef

    def update(self, kl: float, episodes: int) -> None:
        """Nothing changes."""


class AdaptiveKL:
    """Ziegler et al. (2019): β ← β (1 + clip(KL / target − 1, ±0.2) · episodes / horizon).

    Args:
        kl_coef: The first weight.
        target: Nats a sequence.
        horizon: Episodes in which the weight may change by a fifth.

    Raises:
        InputError: A number is not positive.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        check_first_weight(kl_coef)
        if not target > 0 or not horizon > 0:
            raise InputError(f"target and horizon must be positive, not {target} and {horizon}")
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """Raise the weight where the divergence is above its target."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # However many episodes there were, the weight stays positive.
        self.kl_coef *= max(1 + error * episodes / self.horizon, 0.1)


class LagrangianKL:
    """Gradient ascent on the multiplier of KL ≤ target: log β ← log β + rate · (KL − target).

    Args:
        kl_coef: The first weight, above 0.
        target: Nats a sequence.
        rate: Step of log β for a nat.

    Raises:
        InputError: The first weight is not positive.
    """

    def __init__(self, kl_coef: float, target: float, rate: float) -> None:
        check_first_weight(kl_coef)
        self.kl_coef, self.target, self.rate = kl_coef, target, rate

    def update(self, kl: float, episodes: int) -> None:
        """Raise the weight while the constraint is broken, lower it while it is slack."""
        # A step of at most one nat of log β: a first update from far away must not blow it up.
        self.kl_coef *= math.exp(min(max(self.rate * (kl - self.target), -1.0), 1.0))
