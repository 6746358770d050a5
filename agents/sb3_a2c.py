"""Stable-Baselines3's own A2C, token by token, on whole sequences. ``--algorithm sb3_a2c``."""

from dataclasses import dataclass

import stable_baselines3
from stable_baselines3.common.utils import LinearSchedule

from agents.sb3 import SequenceRolloutBuffer, build
from agents.sb3.learner import SB3Learner
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config:
    """Options of Stable-Baselines3's A2C."""

    learning_rate: float = 3e-4
    """Learning rate, annealed linearly to 0."""
    n_steps: int = 64
    """Tokens that each row samples between updates."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 1.0
    """Clip of the gradient's norm."""
    use_rms_prop: bool = False
    """RMSprop instead of Adam."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    options = dict(vars(config))
    options["learning_rate"] = LinearSchedule(config.learning_rate, 0.0, 1.0)
    algorithm = build(
        stable_baselines3.A2C,
        env,
        rollout_buffer_class=SequenceRolloutBuffer,
        policy_options={"entropy": config.ent_coef != 0},
        device=env.objective.reference.device,
        **options,
    )
    return SB3Learner(algorithm)
