"""The simulated human: VADER's compound sentiment of the response, and Boltzmann choices by it.

VADER (Hutto and Gilbert 2014) is a lexicon rated by people, with rules for negation, intensifiers
and contrast.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf_gym.errors import InputError


@lru_cache(maxsize=1)
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def compound(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Sentiment of each response in −1 … 1; the prompts are ignored."""
    analyzer = _analyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


def choose(
    utilities: npt.NDArray[np.float64], temperature: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Boltzmann-rational choices: P(i) ∝ exp(utility_i / temperature).

    Args:
        utilities: (N, K), one comparison per row.
        temperature: 0 always chooses the best, infinity chooses at random.
        rng: Source of randomness.

    Returns:
        (N,) index of the chosen candidate.

    Raises:
        InputError: The temperature is below 0 or NaN.
    """
    if not temperature >= 0:
        raise InputError(f"temperature must be at least 0, not {temperature}")
    if np.isinf(temperature):
        utilities, temperature = np.zeros_like(utilities), 1.0
    # The Gumbel-max trick: argmax of utility/τ + Gumbel noise is a draw from the softmax. Scaled by
    # τ it also works for τ = 0.
    noise = temperature * rng.gumbel(size=utilities.shape)
    chosen: npt.NDArray[np.int64] = (utilities + noise).argmax(1)
    return chosen
