"""Online DPO: the policy's own responses, compared by the score. ``--algorithm online_dpo``."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from agents.sb3.groups import GroupLearner, Groups
from agents.sb3.learning.learner import SB3Learner, response_learner
from agents.sb3.options import GroupOptions, ResponseOptions
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError

Labels = Literal["soft", "hard"]

ROUNDING = 1e-6
"""Difference of two probabilities that counts as none."""


@dataclass(frozen=True)
class Config(GroupOptions):
    """Options of online DPO."""

    beta: float | None = None
    """β of the loss; the environment's if None. With soft labels the optimum is then π*."""
    labels: Labels = "soft"
    """hard: the higher score is preferred. soft: with the probability σ(difference of scores), by
    which a Bradley–Terry labeller would prefer it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_beta(self.beta)


def check_beta(beta: float | None) -> None:
    """Raise an InputError if β is given and not above 0."""
    if beta is not None and beta <= 0:
        raise InputError(f"beta must be above 0, not {beta}")


class OnlineDPO(GroupLearner):
    """−log σ(β · difference of log π/π_ref) over all pairs of responses to a prompt.

    Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback", on the loss of
    Rafailov et al. 2023.
    """

    Options: ClassVar[type[ResponseOptions]] = Config
    options: Config

    def loss(self, groups: Groups) -> Tensor:
        """A mean over pairs; pairs of equal scores say nothing where labels are hard."""
        beta = self.env_kl_coef if self.options.beta is None else self.options.beta
        return dpo_loss(groups, beta, self.options.labels)


def dpo_loss(groups: Groups, beta: float, labels: Labels) -> Tensor:
    """The loss of all pairs (i, j), i < j, of responses to a prompt, a mean over pairs."""
    implied = beta * (groups.log_probs - groups.ref_log_probs)
    k = implied.shape[1]
    i, j = torch.triu_indices(k, k, offset=1, device=implied.device)
    margin = implied[:, i] - implied[:, j]
    difference = groups.scores[:, i] - groups.scores[:, j]
    if labels == "soft":
        wanted = difference.sigmoid()
        losses = F.binary_cross_entropy_with_logits(margin, wanted, reduction="none")
        # A pair on which policy and label agree has no gradient. That of float32's rounding alone
        # would move the weights, because Adam makes a full step of any gradient.
        agree = (margin.sigmoid() - wanted).abs() < ROUNDING
        return torch.where(agree, losses.detach(), losses).mean()
    losses = F.softplus(-margin * difference.sign()) * (difference != 0)
    return losses.mean()


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return response_learner(OnlineDPO, config, env)
