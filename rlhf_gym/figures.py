"""A measured figure: value, standard error, count."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Figure = dict[str, float]


def measured(values: npt.NDArray[np.floating[Any]]) -> Figure:
    """Mean of independent values, its standard error, and their number."""
    n = len(values)
    se = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else float("nan")
    return {"value": float(values.mean()), "se": se, "n": n}
