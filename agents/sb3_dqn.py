"""Stable-Baselines3's DQN on a causal LM as Q-network. ``--algorithm sb3_dqn``.

Its policy is deterministic, so the best it can reach is the best deterministic J, not J*. It
explores as the library does: now and then all rows take tokens drawn at random from the whole
vocabulary, which in language leads nowhere; the shares below are small for that reason.
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
    """Transitions that the replay buffer holds."""
    learning_starts: int = 5_000
    """Tokens to sample first."""
    batch_size: int = 256
    """Transitions of an optimiser step."""
    train_freq: int = 1
    """Tokens of each row between updates."""
    gradient_steps: int = 1
    """Optimiser steps an update."""
    tau: float = 1.0
    """Share of the network that the target network takes over each time."""
    target_update_interval: int = 5_000
    """Tokens between two updates of the target network."""
    exploration_fraction: float = 0.5
    """Share of the training in which exploration falls to its end."""
    exploration_initial_eps: float = 0.2
    """Chance of a random token at the start."""
    exploration_final_eps: float = 0.02
    """And at the end."""
    max_grad_norm: float = 1.0
    """Clip of the gradient's norm."""


def make(config: Config, env: TokenVectorEnv) -> QLearner:
    """Build the learner on `env`."""
    return build_q_learner(DQN, CausalLMDQNPolicy, config, env)
