"""Stable-Baselines3: a transformer as its policy, whole sequences in its buffer, and our PPO."""

from agents.sb3.build import build
from agents.sb3.optimality_callback import OptimalityEvalCallback
from agents.sb3.options import PPOOptions
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.response_algorithm import ResponseAlgorithm
from agents.sb3.response_ppo import PPO
from agents.sb3.rollout.buffer import SequenceRolloutBuffer
from agents.sb3.vec_env import TokenSB3VecEnv, policy_kwargs

__all__ = [
    "PPO",
    "CausalLMPolicy",
    "OptimalityEvalCallback",
    "PPOOptions",
    "ResponseAlgorithm",
    "SequenceRolloutBuffer",
    "TokenSB3VecEnv",
    "build",
    "policy_kwargs",
]
