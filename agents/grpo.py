"""Group relative policy optimisation (GRPO). ``--algorithm grpo``.

Shao et al. 2024, "DeepSeekMath": scores of a group, less their mean, over their standard deviation;
the penalty against the reference in the loss, by k3; a mean over responses of means over their
tokens. `mean_over` token is a mean over all tokens of a minibatch (as in DAPO: Yu et al. 2025), and
`scale_by_std` False leaves the group's scale alone (as in Dr. GRPO: Liu et al. 2025); `kl_loss`
None puts the penalty back into the reward, where its gradient is that of J.
"""

from dataclasses import dataclass

from agents import ppo
from agents.sb3.loss import KLLoss
from agents.sb3.response_ppo import MeanOver
from agents.sb3.rollout.advantages import Baseline

make = ppo.make


@dataclass(frozen=True)
class Config(ppo.Config):
    """Options of GRPO."""

    learning_rate: float = 3e-4
    critic: ppo.Critic = "shared"
    critic_warmup: int = 0
    n_waves: int = 2
    n_epochs: int = 1
    baseline: Baseline = "group_mean"
    samples_per_prompt: int | None = 8
    scale_by_std: bool = True
    mean_over: MeanOver = "response"
    kl_loss: KLLoss | None = "k3"
