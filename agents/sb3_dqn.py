"""Stable-Baselines3's DQN with a causal LM as Q-network. ``--algorithm sb3_dqn``.

Its policy is deterministic, so it can reach only the best deterministic J, not J*. It explores as
the library does: in some steps every row takes a random token of the whole vocabulary. Random
tokens make no sensible text, so the default probabilities below are small.
"""

from dataclasses import dataclass

from stable_baselines3 import DQN

from agents.sb3.stock.q_network import CausalLMDQNPolicy, QLearner, build_q_learner
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config:
    """Options of Stable-Baselines3's DQN."""

    learning_rate: float = 3e-4
    """Learning rate."""
    buffer_size: int = 100_000
    """Size of the replay buffer, in transitions."""
    learning_starts: int = 5_000
    """Tokens to sample before the first update."""
    batch_size: int = 256
    """Transitions per optimiser step."""
    train_freq: int = 1
    """Tokens that each row samples between updates."""
    gradient_steps: int = 1
    """Optimiser steps per update."""
    tau: float = 1.0
    """Polyak coefficient of the target update: target ← τ · network + (1 − τ) · target."""
    target_update_interval: int = 5_000
    """Tokens between two updates of the target network."""
    exploration_fraction: float = 0.5
    """Fraction of the training over which exploration falls to its final value."""
    exploration_initial_eps: float = 0.2
    """Probability of a random token at the start."""
    exploration_final_eps: float = 0.02
    """Probability of a random token after that fraction."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down."""


def make(config: Config, env: TokenVectorEnv) -> QLearner:
    """Build the learner on `env`."""
    return build_q_learner(DQN, CausalLMDQNPolicy, config, env)
