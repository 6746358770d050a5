"""Statistics of a comparison of algorithms, with rliable: means, IQM, intervals over seeds."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from rlhf_gym.errors import InputError
from rlhf_gym.utils.arrays import Floats
from rlhf_gym.utils.statistics import interval

Rows = list[dict[str, str]]
"""Rows of results.csv, without the tuning trials."""

REPETITIONS = 2000
"""Bootstrap samples."""

MEASURES = ("optimality", "score", "kl", "gold", "tokens", "seconds")


def statistics(rows: Rows, env: str, algorithm: str, rate: float) -> dict[str, Any]:
    """Return means over seeds with 95 % t intervals, and the IQM with a bootstrap interval."""
    ours = [r for r in rows if (r["env"], r["algorithm"]) == (env, algorithm)]
    out: dict[str, Any] = {"env": env, "algorithm": algorithm, "rate": rate, "seeds": len(ours)}
    for name in MEASURES:
        values = np.array([float(r[name]) for r in ours if r[name]])
        if len(values):
            out[name], out[f"{name}_interval"] = float(values.mean()), interval(values)
    scores = matrix(rows, [env], [algorithm])
    out["iqm"], out["iqm_interval"] = _bootstrap(scores, "aggregate_iqm")[algorithm]
    out["lowest"] = float(scores[algorithm].min())
    return out


def matrix(rows: Rows, envs: Iterable[str], algorithms: Iterable[str]) -> dict[str, Floats]:
    """Return optimality (seeds, environments) per algorithm; seeds must be in all environments."""
    out = {}
    for algorithm in algorithms:
        columns = [
            {
                int(r["seed"]): float(r["optimality"])
                for r in rows
                if (r["env"], r["algorithm"]) == (env, algorithm)
            }
            for env in envs
        ]
        seeds = sorted(set.intersection(*(set(column) for column in columns)))
        out[algorithm] = np.array([[column[seed] for column in columns] for seed in seeds])
    return out


def overall(rows: Rows, envs: list[str], algorithms: list[str]) -> list[dict[str, Any]]:
    """Return the IQM over all environments, and P(better than the first algorithm)."""
    scores = matrix(rows, envs, algorithms)
    iqm, mean = _bootstrap(scores, "aggregate_iqm"), _bootstrap(scores, "aggregate_mean")
    first = algorithms[0]
    against = {f"{a},{first}": (scores[a], scores[first]) for a in algorithms if a != first}
    better = _bootstrap(against, "probability_of_improvement") if against else {}
    out = []
    for name in algorithms:
        row: dict[str, Any] = {"algorithm": name}
        row["iqm"], row["iqm_interval"] = iqm[name]
        row["mean"], row["mean_interval"] = mean[name]
        if name != first:
            row["better_than_first"], row["better_interval"] = better[f"{name},{first}"]
        out.append(row)
    return out


def _bootstrap(scores: dict[str, Any], measure: str) -> dict[str, tuple[float, list[float]]]:
    """Return a measure of rliable and its 95 % interval by stratified bootstrap over seeds."""
    library, metrics = rliable()
    work: Callable[..., Any] = getattr(metrics, measure)
    points, ends = library.get_interval_estimates(
        scores,
        lambda *arrays: np.array([work(*arrays)]),
        reps=REPETITIONS,
        random_state=np.random.RandomState(0),
    )
    return {k: (float(v[0]), [float(e) for e in ends[k][:, 0]]) for k, v in points.items()}


def rliable() -> tuple[Any, Any]:
    """Return the modules `library` and `metrics` of rliable, an optional dependency.

    Raises:
        InputError: rliable cannot be imported.
    """
    try:
        from rliable import library, metrics
    except ImportError as error:
        raise InputError(
            f"the statistics need rliable ({error}): pip install 'rlhf-gym[compare]', and run the "
            "same command again; no run is lost"
        ) from error
    return library, metrics
