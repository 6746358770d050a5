"""Estimators of a KL divergence from samples, and the exact KL of two distributions.

Source of k1, k2 and k3: J. Schulman, "Approximating KL Divergence" (2020),
http://joschu.net/blog/kl-approx.html.
"""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

RewardEstimator = Literal["k1", "k2", "k3"]


def k1(log_probs: Tensor, other_log_probs: Tensor) -> Tensor:
    """Log p − log q of tokens drawn from p: unbiased for KL(p ‖ q), of either sign.

    In a reward it is the only one of the three whose expected policy gradient is that of −KL. The
    expectation of the others' rewards is another function of the policy, with another optimum.

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

    A token of probability 0 under p costs nothing, even if q never takes it either.
    """
    terms = log_p.exp() * (log_p - log_q)
    # 0 · (−inf − −inf) is NaN. The sum may be a rounding error below 0, hence the clamp.
    return terms.masked_fill(log_p.isneginf(), 0.0).sum(-1).clamp(min=0.0)


REWARD_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""Estimators of the penalty in a reward. Only with k1 is the expected return J."""
