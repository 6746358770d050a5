"""The flagship: PPO on whole responses (`agents.sb3.PPO`). ``--algorithm ppo``."""

from dataclasses import dataclass
from typing import Literal

from stable_baselines3.common.utils import LinearSchedule

from agents.sb3 import PPO, build
from agents.sb3.learner import SB3Learner
from agents.sb3.ppo import KLLoss
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.kl import AdaptiveKL, FixedKL, KLController, LagrangianKL


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
    kl_coef: float | None = None
    """The agent's (first) weight of the penalty against the reference; the environment's β if None.
    J is reported at the environment's β all the same."""
    kl_control: Literal["fixed", "adaptive", "lagrangian"] = "fixed"
    """Keep that weight, or steer the KL to kl_target with it."""
    kl_target: float = 6.0
    """Nats a sequence that a controller steers to."""
    kl_horizon: float = 10_000.0
    """adaptive: episodes in which the weight may change by a fifth."""
    kl_rate: float = 0.1
    """lagrangian: step of the weight's logarithm for a nat too much, an update."""
    kl_loss: KLLoss | None = None
    """Put the penalty into the loss (exact, k2, k3) instead of the reward."""
    microbatch_tokens: int | None = None
    """Most tokens, padding included, in one backward pass; bounds memory, changes nothing."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    options = dict(vars(config))
    options["learning_rate"] = LinearSchedule(config.learning_rate, 0.0, 1.0)
    head = {"value_lr_scale": options.pop("value_lr_scale")}
    for name in ("kl_coef", "kl_control", "kl_target", "kl_horizon", "kl_rate"):
        del options[name]
    options["kl_controller"] = kl_controller(config, env.objective.kl_coef)
    device = env.objective.reference.device
    return SB3Learner(build(PPO, env, policy_options=head, device=device, **options))


def kl_controller(config: Config, kl_coef: float) -> KLController:
    """The controller that the options ask for.

    Args:
        config: The options.
        kl_coef: The environment's β.
    """
    first = kl_coef if config.kl_coef is None else config.kl_coef
    if config.kl_control == "adaptive":
        return AdaptiveKL(first, config.kl_target, config.kl_horizon)
    if config.kl_control == "lagrangian":
        return LagrangianKL(first, config.kl_target, config.kl_rate)
    return FixedKL(first)
