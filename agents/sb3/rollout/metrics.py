"""Metrics of a rollout of whole responses, as the log shows them."""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.objective.enumeration import Enumeration, listable

LEAST_GAIN = 1e-6
"""A smaller J* − J_ref than this may be rounding alone."""


class Scale(NamedTuple):
    """The ends of optimality on the training prompts.

    Attributes:
        reference: J of the reference, 0 on the scale.
        best: J*, 1 on the scale.
    """

    reference: float
    best: float


_scales: WeakKeyDictionary[TokenVectorEnv, Scale | None] = WeakKeyDictionary()


def known_scale(env: TokenVectorEnv) -> Scale | None:
    """J of the reference and J*, where all responses can be enumerated; else None.

    Computed once per environment. Also None where no policy is better than the reference.
    """
    if env not in _scales:
        _scales[env] = _listed(env)
    return _scales[env]


def _listed(env: TokenVectorEnv) -> Scale | None:
    if not listable(env.objective, len(env.prompts), env.max_new_tokens, env.stop_at_eos):
        return None
    task = Enumeration(
        env.objective,
        env.prompts.ids,
        max_new_tokens=env.max_new_tokens,
        stop_at_eos=env.stop_at_eos,
    )
    before = task.value(task.reference).objective
    scale = Scale(float(before.mean()), float(task.best_value.mean()))
    return scale if scale.best - scale.reference > LEAST_GAIN else None


def rollout_metrics(
    waves: list[dict[str, Any]], kl_coef: float, scale: Scale | None
) -> dict[str, float]:
    """Means over the responses of a rollout.

    Args:
        waves: The infos of each wave, with `length` (N,) and `log_prob_mean`.
        kl_coef: The environment's β, at which J is reported.
        scale: The ends of optimality; None where they are unknown.
    """

    def gathered(key: str) -> Any:
        return np.concatenate([wave[key] for wave in waves])

    scores, kl_sums, lengths = gathered("score"), gathered("kl_sum"), gathered("length")
    objective = float((scores - kl_coef * kl_sums).mean())
    figures = {
        "score": scores.mean(),
        "kl_per_sequence": kl_sums.mean(),
        "kl_per_token": kl_sums.sum() / lengths.sum(),
        "objective": objective,
        "entropy_estimate": -np.mean([wave["log_prob_mean"] for wave in waves]),
        "length": lengths.mean(),
        "stopped": (gathered("finish_reason") == "stop").mean(),
        "episodes": len(scores),
    }
    if scale is not None:
        figures["optimality"] = (objective - scale.reference) / (scale.best - scale.reference)
    return figures
