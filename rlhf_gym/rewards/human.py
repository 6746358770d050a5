"""The simulated human: VADER's compound sentiment of the response, and Boltzmann choices on it.

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
    """Sentiment of each response in −1 … 1; the prompts are not looked at."""
    analyzer = _analyzer()
    return [analyzer.polarity_scores(response)["compound"] for response in responses]


def choose(
    utilities: npt.NDArray[np.float64], temperature: float, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Boltzmann-rational choices: P(i) ∝ exp(utility_i / temperature).

    Args:
        utilities: (N, K), one comparison a row.
        temperature: 0 is a perfect judge, infinity a coin.
        rng: Source of randomness.

    Returns:
        (N,) index of the chosen candidate.

    Raises:
        InputError: The temperature is below 0, or no number.
    """
    if not temperature >= 0:
        raise InputError(f"a temperature is 0 or more, not {temperature}")
    if np.isinf(temperature):
        utilities, temperature = np.zeros_like(utilities), 1.0
    # argmax of utility/τ plus Gumbel noise is a draw from the softmax.
    noise = temperature * rng.gumbel(size=utilities.shape)
    chosen: npt.NDArray[np.int64] = (utilities + noise).argmax(1)
    return chosen
