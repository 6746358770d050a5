"""REINFORCE++: no critic, advantages whitened over the rollout. ``--algorithm reinforce_pp``.

Hu et al. 2025: the rewards to come, the KL penalty in them, whitened over all tokens of a rollout,
under PPO's clip. With `baseline` group_mean, `samples_per_prompt` above 1, `scale_by_std` False and
`kl_loss` k2, which leaves the score alone in the reward, it is their REINFORCE++-baseline.
"""

from dataclasses import dataclass
from typing import Literal

from agents.sb3.learning.learner import SB3Learner, response_learner
from agents.sb3.options import NormalizeOver, PolicyGradientOptions, without_critic
from agents.sb3.response_ppo import PPO
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config(PolicyGradientOptions):
    """Options of REINFORCE++."""

    learning_rate: float = 1.5e-4
    n_waves: int = 2
    normalize_advantage: bool = True
    normalize_over: NormalizeOver = "rollout"
    baseline: Literal["none", "group_mean"] = "none"
    """What advantages are measured against: nothing, or the other responses to the prompt."""
    scale_by_std: bool = True
    """Whether group_mean divides by the group's standard deviation."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return response_learner(PPO, without_critic(config, baseline=config.baseline), env)
