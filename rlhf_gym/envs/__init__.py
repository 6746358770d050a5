"""The Gymnasium environments: one token per action."""

from rlhf_gym.envs.actor import Actor
from rlhf_gym.envs.token_env import TokenEnv
from rlhf_gym.envs.token_vector_env import TokenVectorEnv

__all__ = ["Actor", "TokenEnv", "TokenVectorEnv"]
