"""Group relative policy optimisation (GRPO). ``--algorithm grpo``.

Shao et al. 2024, "DeepSeekMath": scores of a group, less their mean, over their standard deviation;
the penalty against the reference in the loss, by k3; a mean over responses of means over their
tokens. `mean_over` token is a mean over all tokens of a minibatch (as in DAPO: Yu et al. 2025), and
`scale_by_std` False leaves the group's scale alone (as in Dr. GRPO: Liu et al. 2025); `kl_loss`
None puts the penalty back into the reward, where its gradient is that of J.
"""

from dataclasses import dataclass

from agents.sb3.learning.learner import SB3Learner, response_learner
from agents.sb3.options import KLLoss, MeanOver, PolicyGradientOptions, without_critic
from agents.sb3.response_ppo import PPO
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config(PolicyGradientOptions):
    """Options of GRPO."""

    samples_per_prompt: int | None = 8
    n_waves: int = 2
    mean_over: MeanOver = "response"
    kl_loss: KLLoss | None = "k3"
    scale_by_std: bool = True
    """Whether a group's advantages are divided by its standard deviation."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return response_learner(PPO, without_critic(config, baseline="group_mean"), env)
