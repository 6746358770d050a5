"""The flagship as Ziegler et al. (2019) trained. ``--algorithm ppo_ziegler2019``.

Their published numbers; 512 episodes per update with the usual 256 rows. The environment has the
rest: temperature 0.7, the cut at a full stop, score −1 without one.
"""

from dataclasses import dataclass

from agents import ppo
from agents.sb3.options import Adam, CriticStart, KLControl, NormalizeOver

make = ppo.make


@dataclass(frozen=True)
class Config(ppo.Config):
    """Options of Ziegler et al. (arXiv 1909.08593), as its code has them."""

    learning_rate: float = 1e-5
    adam: Adam = "tf1"
    critic: CriticStart = "shared"
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
    whiten_rewards: bool = True
    max_grad_norm: float = float("inf")
    kl_coef: float | None = 0.15
    kl_control: KLControl = "adaptive"
    kl_target: float = 6.0
    kl_horizon: float = 10_000.0
