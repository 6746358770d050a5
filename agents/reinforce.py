"""REINFORCE with a learned baseline. ``--algorithm reinforce``.

Williams 1992: the rewards to come, less the critic's value, times the gradient of log π. Nothing is
clipped; later steps of an update are corrected by the ratio alone (`n_minibatches` 1 has no later
ones).
"""

from dataclasses import dataclass

from agents import ppo

make = ppo.make


@dataclass(frozen=True)
class Config(ppo.Config):
    """Options of REINFORCE."""

    critic_lr_scale: float = 6.0
    value_lr_scale: float = 20.0
    n_waves: int = 2
    n_epochs: int = 1
    gae_lambda: float = 1.0
    clip_range: float = 1e9
