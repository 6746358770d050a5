"""Evaluation of policies and of reward models."""

from rlhf_gym.evaluation.drawing import Drawn, draw_responses
from rlhf_gym.evaluation.policies import evaluate
from rlhf_gym.evaluation.record import evaluate_policy
from rlhf_gym.evaluation.reward_model_slices import analyse_reward_model
from rlhf_gym.evaluation.reward_models import evaluate_reward_model

__all__ = [
    "Drawn",
    "analyse_reward_model",
    "draw_responses",
    "evaluate",
    "evaluate_policy",
    "evaluate_reward_model",
]
