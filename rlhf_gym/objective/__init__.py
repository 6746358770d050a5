"""The objective J, its optimum J*, and exact enumeration."""

from rlhf_gym.objective.enumeration import Enumeration
from rlhf_gym.objective.objective import Objective, Settlement
from rlhf_gym.objective.optimum import best_of_n, best_value, optimality

__all__ = ["Enumeration", "Objective", "Settlement", "best_of_n", "best_value", "optimality"]
