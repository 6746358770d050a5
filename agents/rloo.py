"""REINFORCE, each response against the others to its prompt (RLOO). ``--algorithm rloo``.

Ahmadian et al. 2024, "Back to Basics": the return of a whole response, its KL penalty taken off, is
the advantage of each of its tokens. No critic. With several steps per update the ratio's clip is
PPO's; with `n_minibatches` 1 the one step is REINFORCE's.
"""

from dataclasses import dataclass

from agents.sb3.learning.learner import SB3Learner, response_learner
from agents.sb3.options import PolicyGradientOptions, without_critic
from agents.sb3.response_ppo import PPO
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config(PolicyGradientOptions):
    """Options of RLOO."""

    samples_per_prompt: int | None = 8
    n_waves: int = 2


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return response_learner(PPO, without_critic(config, baseline="leave_one_out"), env)
