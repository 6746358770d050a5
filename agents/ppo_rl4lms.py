"""The flagship with the numbers of RL4LMs' PPO. ``--algorithm ppo_rl4lms``.

Ramamurthy et al. (2023), IMDB: Stable-Baselines3's PPO with a critic of its own and a constant
learning rate. They update after 1,280 tokens; here a wave is the least, so take few rows
(``--num-envs 27`` of 48 tokens). What differs: their γ = 0.99 is 1, since the objective is
undiscounted. They whiten advantages over minibatches of 64 tokens of many responses; here a
minibatch is one or two whole responses, whose own mean would take away what tells a good one from a
bad one, so all of a rollout are whitened together. Their value head starts at random, and their
AdamW decays weights by 10⁻⁶.
"""

from dataclasses import dataclass

from agents import ppo
from agents.sb3.options import CriticStart, KLControl, NormalizeOver

make = ppo.make


@dataclass(frozen=True)
class Config(ppo.Config):
    """Options of RL4LMs (arXiv 2210.01241), its gpt2_ppo task."""

    learning_rate: float = 1e-6
    anneal: bool = False
    critic: CriticStart = "separate"
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
    kl_control: KLControl = "adaptive"
    kl_target: float = 24.0  # 0.5 nats per token, 48 tokens
    kl_horizon: float = 270.0  # the weight moves by 2 % an update of 27 episodes at most
    adam_eps: float = 1e-8
    normalize_advantage: bool = True
    normalize_over: NormalizeOver = "rollout"
