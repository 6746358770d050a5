"""Expert iteration: the best of n, imitated. ``--algorithm expert_iteration``."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from agents.sb3.groups import GroupLearner, Groups
from agents.sb3.learning.learner import SB3Learner, response_learner
from agents.sb3.options import GroupOptions, ResponseOptions
from rlhf_gym.envs import TokenVectorEnv

BestBy = Literal["return", "score"]


@dataclass(frozen=True)
class Config(GroupOptions):
    """Options of expert iteration."""

    best_by: BestBy = "return"
    """What makes a response the best: its score alone, or its return, score − β · log π/π_ref.
    Imitating the score alone has no end: nothing pulls back to the reference."""


class ExpertIteration(GroupLearner):
    """Maximises the likelihood of the best of k of its own responses to each prompt.

    Best-of-n distilled into the sampler, again and again (Anthony et al. 2017; for language models
    RAFT: Dong et al. 2023, ReST: Gulcehre et al. 2023).
    """

    Options: ClassVar[type[ResponseOptions]] = Config
    options: Config

    def loss(self, groups: Groups) -> Tensor:
        """Negative log-likelihood of the best responses, a mean over their tokens."""
        worth = groups.scores
        if self.options.best_by == "return":
            beta = self.token_env.objective.kl_coef
            worth = worth - beta * (groups.old_log_probs - groups.ref_log_probs)
        best = worth.argmax(1, keepdim=True)
        chosen, lengths = (torch.gather(x, 1, best) for x in (groups.log_probs, groups.lengths))
        return -chosen.sum() / lengths.sum()


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return response_learner(ExpertIteration, config, env)
