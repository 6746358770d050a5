"""Checks of an environment and a policy that take seconds, to run before hours of training.

Each check tests one property that RLHF needs: the first ratio is 1, the initial KL is 0, all ways
to compute a log-prob agree, all ways to pay a reward agree. A check that fails returns the problem
and its fix. Notation: N rows, T tokens.
"""

from collections.abc import Callable

from agents.doctor.data_checks import endings, form, prompts, weights
from agents.doctor.environment_checks import ends, rewards, score
from agents.doctor.policy_checks import (
    cache,
    decoding,
    drawn_as_scored,
    dropout,
    frozen,
    mask,
    neighbours,
    ratio,
    recomputed,
    start,
    temperature,
    vocabulary,
)
from agents.doctor.seam_check import seam
from agents.doctor.subject import Problem, Subject, own_chance

__all__ = [
    "CHECKS",
    "DATA_CHECKS",
    "Problem",
    "Subject",
    "examine",
    "examine_data",
    "own_chance",
    "seam",
]

CHECKS: tuple[Callable[[Subject], Problem | None], ...] = (
    vocabulary,
    mask,
    ends,
    temperature,
    frozen,
    dropout,
    recomputed,
    drawn_as_scored,
    ratio,
    decoding,
    neighbours,
    cache,
    start,
    score,
    rewards,
)
DATA_CHECKS: tuple[Callable[[Subject], Problem | None], ...] = (prompts, form, weights, endings)
"""Checks of the data. A problem is no reason to refuse a training, so only the doctor runs them."""

FATAL = (vocabulary, mask, ends)
"""The checks after these rely on them, so if one of these fails, the rest are not run."""


def examine(subject: Subject) -> list[Problem]:
    """Run all checks and return the problems found. torch's random state is left unchanged."""
    found = []
    with own_chance():
        for check in CHECKS:
            problem = check(subject)
            if problem is not None:
                found.append(problem)
                if check in FATAL:
                    break
    return found


def examine_data(subject: Subject) -> list[Problem]:
    """Run the checks of the data and return the problems found."""
    found = []
    for check in DATA_CHECKS:
        problem = check(subject)
        if problem is not None:
            found.append(problem)
            if check is weights:  # the checks after it need scores that are numbers
                break
    return found
