"""Means with standard errors, and confidence intervals over seeds."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_gym.utils.arrays import Floats

Figure = dict[str, float]
"""A measured quantity: its `value`, its standard error `se`, and the count `n`."""


def measured(values: npt.NDArray[np.floating[Any]]) -> Figure:
    """Return the mean of independent values, its standard error (NaN for one), and the count."""
    n = len(values)
    se = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else float("nan")
    return {"value": float(values.mean()), "se": se, "n": n}


def interval(values: Floats) -> float:
    """Return half the width of a 95 % t interval over seeds; NaN for a single seed."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
