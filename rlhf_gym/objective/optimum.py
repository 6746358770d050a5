"""The best value that any policy can reach, J*, and how close a policy comes to it.

J* = β · log E_{y ∼ π_ref}[exp(R(x, y) / β)] for each prompt, reached by π* ∝ π_ref · exp(R / β)
(Korbak et al. 2022, arXiv 2205.11275; Rafailov et al. 2023, arXiv 2305.18290, appendix A.1).
Optimality = (J(π) − J(π_ref)) / (J* − J(π_ref)), means over prompts: 0 is the reference, 1 is the
best possible, negative is worse than doing nothing.

Notation: P prompts, n samples of each.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rlhf_gym.utils.arrays import Floats

MIN_ESS_FOR_JACKKNIFE = 5.0
"""Below this effective sample size the (low) bias of J* is not corrected."""


class Best(NamedTuple):
    """Estimates of the optimum on each prompt.

    Attributes:
        value: (P,) J*.
        score: (P,) expected score of π*.
        kl: (P,) KL(π* ‖ π_ref) in nats per sequence.
        ess: (P,) effective sample size of the estimate, at most n.
        se: (P,) standard error of J* by the delta method; it means little where the ESS is small.
    """

    value: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64]
    kl: npt.NDArray[np.float64]
    ess: npt.NDArray[np.float64]
    se: npt.NDArray[np.float64]

    def mean(self, confidence: float = 0.95) -> dict[str, float]:
        """J* averaged over these prompts, with the interval due to sampling responses.

        The prompts are taken as given: the interval does not cover the choice of prompts.

        Returns:
            value, se, low, high, n (prompts).
        """
        value, se = float(self.value.mean()), float(np.sqrt((self.se**2).sum()) / len(self.se))
        half = NormalDist().inv_cdf((1 + confidence) / 2) * se
        return {
            "value": value,
            "se": se,
            "low": value - half,
            "high": value + half,
            "n": len(self.value),
        }

    def samples_needed(self, n: int, ess: float) -> int:
        """About how many samples per prompt give a mean ESS of `ess`, as n gave this one."""
        return int(np.ceil(n * ess / self.ess.mean()))


def best_value(
    scores: Floats,
    kl_coef: float,
    log_ratios: Floats | None = None,
    policy_share: float | Sequence[float] = 0.0,
) -> Best:
    """Estimate J* from samples of the reference, or of the reference and other policies together.

    Samples of several proposals are weighted by the balance heuristic (Veach and Guibas 1995), as
    draws from their mixture. The weights then stay bounded if any one proposal covers π*.

    Log-mean-exp is biased low: the logarithm is concave, so by Jensen's inequality the mean of the
    log of an average is below the log of its mean. The jackknife (Quenouille 1956) removes the
    part of order 1/n.

    Args:
        scores: (P, n) R(x, y).
        kl_coef: β > 0.
        log_ratios: log π − log π_ref of each sample: (P, n) for one policy, (K, P, n) for K; None
            if all samples are the reference's.
        policy_share: Share of the n samples that the policy drew, or K shares.

    Returns:
        Per-prompt figures.

    Raises:
        ValueError: The shares do not fit the ratios, or leave nothing to the reference.
    """
    logs = np.asarray(scores, dtype=np.float64) / kl_coef
    shares_drawn = np.atleast_1d(np.asarray(policy_share, dtype=np.float64))
    if log_ratios is not None and shares_drawn.sum() > 0:
        ratios = np.asarray(log_ratios, dtype=np.float64)
        ratios = ratios[None] if ratios.ndim == 2 else ratios
        if len(ratios) != len(shares_drawn) or not shares_drawn.sum() < 1 or shares_drawn.min() < 0:
            raise ValueError(f"shares {shares_drawn} do not fit {len(ratios)} policies")
        with np.errstate(divide="ignore"):
            weighed = np.log(shares_drawn)[:, None, None] + ratios
        reference = np.full((1, *logs.shape), np.log1p(-shares_drawn.sum()))
        logs = logs - np.logaddexp.reduce(np.concatenate([reference, weighed]), axis=0)
    n = logs.shape[1]
    peak = logs.max(1, keepdims=True)
    weights = np.exp(logs - peak)
    total = weights.sum(1)
    plain = np.log(total / n) + peak[:, 0]
    rest = np.maximum(total[:, None] - weights, np.finfo(float).tiny)
    left_out = np.log(rest / max(n - 1, 1)) + peak
    shares = weights / total[:, None]
    ess = 1.0 / (shares**2).sum(1)
    # The correction is only of first order. If one sample outweighs the rest, leaving it out
    # changes the logarithm without bound, so small ESS keep the plain estimate.
    log_z = np.where(ess >= MIN_ESS_FOR_JACKKNIFE, n * plain - (n - 1) * left_out.mean(1), plain)
    score = (shares * scores).sum(1)
    # KL = Σ p* log(π*/π_ref), with log(π*/π_ref) = R/β − log Z.
    return Best(
        value=kl_coef * log_z,
        score=score,
        kl=np.maximum(score / kl_coef - log_z, 0.0),
        ess=ess,
        se=kl_coef * np.sqrt(np.maximum(1 / ess - 1 / n, 0.0)),
    )


def best_of_n(scores: Floats, k: int, kl_coef: float) -> npt.NDArray[np.float64]:
    """J of best-of-k on each prompt, (P,), with the bound log k − (k−1)/k as its KL.

    The bound is the exact KL if no two responses have the same score; with ties the KL is smaller.
    Source: Stiennon et al. 2020 (arXiv 2009.01325), appendix G.3; Beirami et al. 2024 (arXiv
    2401.01879).

    Args:
        scores: (P, n) of reference samples; n is cut to a multiple of k.
        k: Number of samples to choose from.
        kl_coef: β.
    """
    whole = scores[:, : scores.shape[1] // k * k]
    best = whole.reshape(len(scores), -1, k).max(2).mean(1)
    value: npt.NDArray[np.float64] = best - kl_coef * (np.log(k) - (k - 1) / k)
    return value


def optimality(
    value: Floats, reference: Floats, best: Floats, *, resamples: int = 4000, seed: int = 0
) -> dict[str, float]:
    """Optimality of a policy from per-prompt J, with a 95 % bootstrap interval over prompts.

    Args:
        value: (P,) J(π) of each prompt.
        reference: (P,) J(π_ref) of the same prompts.
        best: (P,) J* of the same prompts.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        value, se, low, high, n.
    """
    gains, room = np.asarray(value - reference), np.asarray(best - reference)
    rows = np.random.default_rng(seed).integers(len(gains), size=(resamples, len(gains)))
    # A ratio of means, not a mean of ratios: a prompt with little room would dominate the latter.
    ratios = gains[rows].mean(1) / room[rows].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return {
        "value": float(gains.mean() / room.mean()),
        "se": float(ratios.std()),
        "low": float(low),
        "high": float(high),
        "n": len(gains),
    }
