"""Expert iteration: the best of n, imitated. ``--algorithm expert_iteration``."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from agents.sb3.group_options import GroupConfig, make_group_learner
from agents.sb3.groups import GroupLearner, Groups
from agents.sb3.run.learner import SB3Learner
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError

BestBy = Literal["return", "score"]


@dataclass(frozen=True)
class Config(GroupConfig):
    """Options of expert iteration."""

    best_by: BestBy = "return"
    """What makes a response the best: its score alone, or its return, score − β · log π/π_ref.
    Imitating the score alone has no end: nothing pulls back to the reference."""


class ExpertIteration(GroupLearner):
    """Maximises the likelihood of the best of k of its own responses to each prompt.

    Best-of-n distilled into the sampler, again and again (Anthony et al. 2017; for language models
    RAFT: Dong et al. 2023, ReST: Gulcehre et al. 2023).

    Args:
        *args: As in `ResponseAlgorithm`.
        best_by: "return" or "score".
        **options: As in `ResponseAlgorithm`.
    """

    def __init__(self, *args: Any, best_by: BestBy = "return", **options: Any) -> None:
        if best_by not in get_args(BestBy):
            raise InputError(f"best_by must be one of {get_args(BestBy)}, not {best_by!r}")
        self.best_by = best_by
        super().__init__(*args, **options)

    def loss(self, groups: Groups) -> Tensor:
        """Negative log-likelihood of the best responses, a mean over their tokens."""
        worth = groups.scores
        if self.best_by == "return":
            beta = self.env.get_attr("objective")[0].kl_coef  # type: ignore[union-attr]
            worth = worth - beta * (groups.old_log_probs - groups.ref_log_probs)
        best = worth.argmax(1, keepdim=True)
        chosen, lengths = (torch.gather(x, 1, best) for x in (groups.log_probs, groups.lengths))
        return -chosen.sum() / lengths.sum()


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return make_group_learner(ExpertIteration, config, env, best_by=config.best_by)
