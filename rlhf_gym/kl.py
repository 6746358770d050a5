"""Estimators of a KL divergence from the log-probs of sampled tokens.

Source: J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html.
"""

from torch import Tensor


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
