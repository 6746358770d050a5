"""Stable-Baselines3's own PPO, token by token, on whole sequences. ``--algorithm sb3_ppo``."""

from dataclasses import dataclass

import stable_baselines3

from agents.sb3.run.learner import SB3Learner, stock_learner
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config:
    """Options of Stable-Baselines3's PPO."""

    learning_rate: float = 3e-4
    """Learning rate, annealed linearly to 0."""
    n_steps: int = 64
    """Tokens that each row samples between updates."""
    batch_size: int = 1024
    """Tokens of a minibatch, about; it holds whole sequences."""
    n_epochs: int = 1
    """Passes over the tokens of an update."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    clip_range: float = 0.2
    """ε of the ratio's clip."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 1.0
    """Clip of the gradient's norm."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return stock_learner(stable_baselines3.PPO, config, env)
