"""Reward-model training and supervised fine-tuning."""

from rlhf_gym.training.reward_run import FittedRewardModel, fit_reward_model
from rlhf_gym.training.reward_training import RewardTraining
from rlhf_gym.training.sft_data import SFTExample, load_examples
from rlhf_gym.training.sft_run import fine_tune

__all__ = [
    "FittedRewardModel",
    "RewardTraining",
    "SFTExample",
    "fine_tune",
    "fit_reward_model",
    "load_examples",
]
