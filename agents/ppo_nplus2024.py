"""The flagship as the N+ details have it. ``--algorithm ppo_nplus2024``.

Huang et al. (2024): 512 episodes per update with the usual 256 rows; the critic starts from the
reward model. The environment has the rest: β = 0.05, temperature 0.7, the EOS trick. What differs:
the critic has the reward model's trunk but a head of zeros, where theirs has its head too.
"""

from dataclasses import dataclass

from agents import ppo
from agents.sb3.options import CriticStart, NormalizeOver

make = ppo.make


@dataclass(frozen=True)
class Config(ppo.Config):
    """Options of Huang et al. (arXiv 2403.17031)."""

    learning_rate: float = 3e-6
    critic: CriticStart = "reward_model"
    critic_lr_scale: float = 1.0
    value_lr_scale: float = 1.0
    critic_warmup: int = 0
    n_waves: int = 2
    n_epochs: int = 4
    n_minibatches: int = 1
    gae_lambda: float = 0.95
    clip_range_vf: float | None = 0.2
    vf_coef: float = 0.05  # their 0.1 weighs half the squared error
    normalize_advantage: bool = True
    normalize_over: NormalizeOver = "rollout"
    max_grad_norm: float = float("inf")
