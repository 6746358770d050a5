"""The flagship: PPO on whole responses (`agents.sb3.PPO`). ``--algorithm ppo``."""

from dataclasses import dataclass

from stable_baselines3.common.utils import LinearSchedule

from agents.sb3 import PPO, build
from agents.sb3.learner import SB3Learner
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config:
    """Options of the flagship PPO."""

    learning_rate: float = 3e-4
    """Learning rate, annealed linearly to 0."""
    value_lr_scale: float = 30.0
    """The value head's learning rate is so many times the policy's."""
    n_waves: int = 2
    """Waves an update; an update has n_waves × num_envs episodes."""
    n_epochs: int = 1
    """Passes over the episodes of an update."""
    n_minibatches: int = 8
    """Optimiser steps a pass."""
    gae_lambda: float = 0.98
    """λ of generalised advantage estimation."""
    clip_range: float = 0.2
    """ε of the ratio's clip."""
    kl_old_coef: float = 0.0
    """Weight of KL(π_old ‖ π_θ) in the loss."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    normalize_advantage: bool = True
    """Whiten advantages over each minibatch."""
    max_grad_norm: float = 1.0
    """Clip of the gradient's norm."""
    target_kl: float | None = None
    """Stop an update early once KL(π_old ‖ π_θ) exceeds 1.5 times this."""
    microbatch_tokens: int | None = None
    """Most tokens, padding included, in one backward pass; bounds memory, changes nothing."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    options = dict(vars(config))
    options["learning_rate"] = LinearSchedule(config.learning_rate, 0.0, 1.0)
    head = {"value_lr_scale": options.pop("value_lr_scale")}
    device = env.objective.reference.device
    return SB3Learner(build(PPO, env, policy_options=head, device=device, **options))
