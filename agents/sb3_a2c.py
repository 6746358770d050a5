"""Stable-Baselines3's A2C, unmodified, on whole sequences. ``--algorithm sb3_a2c``."""

from dataclasses import dataclass

import stable_baselines3

from agents.sb3.learning.learner import SB3Learner, stock_learner
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config:
    """Options of Stable-Baselines3's A2C."""

    learning_rate: float = 3e-4
    """Initial learning rate; it decays linearly to 0."""
    n_steps: int = 8
    """Tokens that each row samples between updates."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation (GAE)."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down."""
    use_rms_prop: bool = False
    """Use RMSprop instead of Adam."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return stock_learner(stable_baselines3.A2C, config, env)
