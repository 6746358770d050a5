"""Means with standard errors, and confidence intervals over seeds."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_gym.utils.arrays import Floats

Figure = dict[str, float]
"""A measured quantity: its `value`, its standard error `se`, and the count `n`.

Some also have `low` and `high`, the ends of their 95 % interval.
"""


def measured(values: npt.NDArray[np.floating[Any]]) -> Figure:
    """Return the mean of independent values, its standard error (NaN for one), and the count."""
    n = len(values)
    se = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else float("nan")
    return {"value": float(values.mean()), "se": se, "n": n}


def wilson(share: float, se: float, n: int, clusters: int) -> tuple[float, float]:
    """Return the 95 % score interval (Wilson 1927) of a share of yes-or-no results.

    Unlike share ± 1.96 · se it stays inside 0 … 1 and has a width at 0 and at 1, where the standard
    error is 0: 3 of 3 is 0.44 to 1.

    Args:
        share: The share, 0 … 1.
        se: Its standard error over clusters of results, such as those on one prompt.
        n: Number of results.
        clusters: Number of clusters. Results in one cluster depend on each other, so the interval
            is that of share · (1 − share) / se² independent results, at most n. If se is 0, each
            cluster counts once.

    Returns:
        Both ends; NaN for fewer than two clusters, which show no variation.
    """
    if clusters < 2:
        return float("nan"), float("nan")
    effective = min(share * (1 - share) / se**2, n) if se > 0 else clusters
    z = 1.959963984540054
    spread = z / (1 + z * z / effective)
    middle = (share + z * z / (2 * effective)) / (1 + z * z / effective)
    half = spread * math.sqrt(share * (1 - share) / effective + z * z / (4 * effective**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def interval(values: Floats) -> float:
    """Return half the width of a 95 % t interval over seeds; NaN for a single seed."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
