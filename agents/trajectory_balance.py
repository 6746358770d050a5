"""Regression on the known optimum itself. ``--algorithm trajectory_balance``."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from agents.sb3.groups import GroupLearner, Groups
from agents.sb3.learning.learner import SB3Learner, response_learner
from agents.sb3.options import GroupOptions, ResponseOptions
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config(GroupOptions):
    """Options of trajectory balance."""


class TrajectoryBalance(GroupLearner):
    """Makes log π/π_ref − R/β the same for all responses to a prompt, as it is for π*.

    π* = π_ref · exp(R/β) / Z, so that difference is −log Z whatever the response: its variance
    within a group is 0 at the optimum alone. The group's mean estimates −log Z (VarGrad: Richter et
    al. 2020; trajectory balance: Malkin et al. 2022, Hu et al. 2024 on language models). Responses
    may come from any policy. Scaled by β, so that the loss is in the score's units.
    """

    Options: ClassVar[type[ResponseOptions]] = Config

    def loss(self, groups: Groups) -> Tensor:
        """β/2 of the variance within groups (k − 1 in the denominator), a mean over groups."""
        beta = self.env_kl_coef
        gap = groups.log_probs - groups.ref_log_probs - groups.scores / beta
        return beta / 2 * gap.var(1).mean()


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return response_learner(TrajectoryBalance, config, env)
