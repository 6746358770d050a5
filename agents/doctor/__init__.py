"""A pre-flight over an environment and a policy: seconds long, before hours are spent.

Each check asks one thing that must hold (DESIGN of the objective: ratio 1, KL 0, one log-prob, one
reward) and says, where it does not, what is wrong and how to mend it. Notation: N rows, T tokens.
"""

from collections.abc import Callable

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
from agents.doctor.subject import Problem, Subject, own_chance

__all__ = ["CHECKS", "Problem", "Subject", "examine"]

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
FATAL = (vocabulary, mask, ends)
"""Where one of these fails, the others have nothing to look at."""


def examine(subject: Subject) -> list[Problem]:
    """Run all checks; what does not hold."""
    found = []
    with own_chance():
        for check in CHECKS:
            problem = check(subject)
            if problem is not None:
                found.append(problem)
                if check in FATAL:
                    break
    return found
