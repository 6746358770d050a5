"""What a response is worth: reward models, ensembles, functions, shaping."""

from rlhf_gym.rewards.ensemble import RewardEnsemble
from rlhf_gym.rewards.responses import Responses
from rlhf_gym.rewards.reward_model import RewardModel

__all__ = ["Responses", "RewardEnsemble", "RewardModel"]
