"""Stable-Baselines3's PPO, unmodified, on whole sequences. ``--algorithm sb3_ppo``."""

from dataclasses import dataclass

import stable_baselines3

from agents.sb3.learning.learner import SB3Learner, stock_learner
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config:
    """Options of Stable-Baselines3's PPO."""

    learning_rate: float = 3e-4
    """Initial learning rate; it decays linearly to 0."""
    n_steps: int = 64
    """Tokens that each row samples between updates."""
    batch_size: int = 1024
    """Tokens per minibatch. The actual number varies, because sequences are not split."""
    n_epochs: int = 1
    """Passes over the tokens of each update."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation (GAE)."""
    clip_range: float = 0.2
    """Clip range ε of the probability ratio."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return stock_learner(stable_baselines3.PPO, config, env)
