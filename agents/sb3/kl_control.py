"""Controllers that choose the weight of the KL penalty."""

import math
from typing import Protocol

from agents.sb3.options import PolicyGradientOptions
from rlhf_gym.errors import InputError


class KLController(Protocol):
    """Chooses the weight of an agent's KL penalty from the KL of its episodes.

    Attributes:
        kl_coef: The weight now.
    """

    kl_coef: float

    def update(self, kl: float, episodes: int) -> None:
        """Use the mean KL(π ‖ π_ref), in nats per sequence, of some episodes."""
        ...


def check_first_weight(kl_coef: float) -> None:
    """Raise an InputError if a controller that multiplies could never move this weight."""
    if not kl_coef > 0:
        raise InputError(
            f"a controller of the KL penalty multiplies its weight, so {kl_coef} would never "
            "change; set kl_coef above 0, or kl_control=fixed"
        )


class FixedKL:
    """Always the same weight.

    Args:
        kl_coef: The weight.
    """

    def __init__(self, kl_coef: float) -> None:
        self.kl_coef = kl_coef

    def update(self, kl: float, episodes: int) -> None:
        """Nothing changes."""


class AdaptiveKL:
    """Ziegler et al. (2019): β ← β (1 + clip(KL / target − 1, ±0.2) · episodes / horizon).

    Args:
        kl_coef: The first weight.
        target: Nats per sequence.
        horizon: Episodes in which the weight may change by a fifth.

    Raises:
        InputError: A number is not positive.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        check_first_weight(kl_coef)
        if not target > 0 or not horizon > 0:
            raise InputError(f"target and horizon must be positive, not {target} and {horizon}")
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """Raise the weight where the divergence is above its target."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # However many episodes there were, the weight stays positive.
        self.kl_coef *= max(1 + error * episodes / self.horizon, 0.1)


class LagrangianKL:
    """Gradient ascent on the multiplier of KL ≤ target: log β ← log β + rate · (KL − target).

    Args:
        kl_coef: The first weight, above 0.
        target: Nats per sequence.
        rate: Step of log β per nat.

    Raises:
        InputError: The first weight is not positive.
    """

    def __init__(self, kl_coef: float, target: float, rate: float) -> None:
        check_first_weight(kl_coef)
        self.kl_coef, self.target, self.rate = kl_coef, target, rate

    def update(self, kl: float, episodes: int) -> None:
        """Raise the weight while the constraint is broken, lower it while it is slack."""
        # A step of at most one nat of log β: a first update from far away must not blow it up.
        self.kl_coef *= math.exp(min(max(self.rate * (kl - self.target), -1.0), 1.0))


def kl_controller(options: PolicyGradientOptions, kl_coef: float) -> KLController | None:
    """The controller that the options ask for; None follows the environment's β.

    Args:
        options: The options.
        kl_coef: The environment's β.
    """
    if options.kl_control == "fixed":
        return None if options.kl_coef is None else FixedKL(options.kl_coef)
    first = kl_coef if options.kl_coef is None else options.kl_coef
    if options.kl_control == "adaptive":
        return AdaptiveKL(first, options.kl_target, options.kl_horizon)
    return LagrangianKL(first, options.kl_target, options.kl_rate)
