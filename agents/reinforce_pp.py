"""REINFORCE++: no critic, advantages whitened over the rollout. ``--algorithm reinforce_pp``.

Hu et al. 2025: the rewards to come, the KL penalty in them, whitened over all tokens of a rollout,
under PPO's clip. With `baseline` group_mean, `samples_per_prompt` above 1, `scale_by_std` False and
`kl_loss` k2, which leaves the score alone in the reward, it is their REINFORCE++-baseline.
"""

from dataclasses import dataclass
from typing import Literal

from agents import ppo
from agents.sb3.rollout.advantages import Baseline

make = ppo.make


@dataclass(frozen=True)
class Config(ppo.Config):
    """Options of REINFORCE++."""

    critic: ppo.Critic = "shared"
    critic_warmup: int = 0
    n_waves: int = 2
    n_epochs: int = 1
    baseline: Baseline = "none"
    normalize_advantage: bool = True
    normalize_over: Literal["minibatch", "rollout"] = "rollout"
