"""The flagship with the numbers of RL4LMs' PPO. ``--algorithm ppo_rl4lms``.

Ramamurthy et al. (2023), IMDB: Stable-Baselines3's PPO with a critic of its own and a constant
learning rate. They update after 1,280 tokens; here a wave is the least, so take few rows
(``--num-envs 27`` of 48 tokens). Their γ = 0.99 is 1 here: the objective is undiscounted.
"""

from dataclasses import dataclass
from typing import Literal

from agents import ppo

make = ppo.make


@dataclass(frozen=True)
class Config(ppo.Config):
    """Options of RL4LMs (arXiv 2210.01241), its gpt2_ppo task."""

    learning_rate: float = 1e-6
    anneal: bool = False
    critic: ppo.Critic = "separate"
    critic_lr_scale: float = 1.0
    value_lr_scale: float = 1.0
    critic_warmup: int = 0
    n_waves: int = 1
    n_epochs: int = 5
    n_minibatches: int = 20
    gae_lambda: float = 0.95
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    kl_coef: float | None = 0.1
    kl_control: Literal["fixed", "adaptive", "lagrangian"] = "adaptive"
    kl_target: float = 24.0  # 0.5 nats a token, 48 tokens
    normalize_advantage: bool = True
