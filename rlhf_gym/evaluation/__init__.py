"""Evaluation of policies and of reward models."""

from rlhf_gym.evaluation.policies import Drawn, draw_responses, evaluate
from rlhf_gym.evaluation.reward_models import evaluate_reward_model

__all__ = ["Drawn", "draw_responses", "evaluate", "evaluate_reward_model"]
