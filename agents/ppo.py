"""PPO on whole responses, the flagship (`agents.sb3.PPO`). ``--algorithm ppo``."""

from dataclasses import dataclass

from agents.sb3.learning.learner import SB3Learner, response_learner
from agents.sb3.options import PPOOptions
from agents.sb3.response_ppo import PPO
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config(PPOOptions):
    """Options of the flagship PPO."""


def make(config: PPOOptions, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return response_learner(PPO, config, env)
