"""Several reward models, or several heads of one, as one reward."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.prompts import Prompt
from rlhf_gym.errors import InputError
from rlhf_gym.rewards.reward_model import RewardModel

Pooling = Literal["mean", "min", "uncertainty"]


def pool(scores: Tensor, pooling: Pooling, uncertainty_weight: float = 1.0) -> Tensor:
    """One score of M members' scores: (N, M) -> (N,).

    Args:
        scores: The members' scores, on one scale.
        pooling: "mean"; "min", the most pessimistic member; "uncertainty", the mean minus
            `uncertainty_weight` times the members' variance. Source: Coste et al. 2023 (arXiv
            2310.02743), equations 2 to 4 (mean, worst-case and uncertainty-weighted
            optimisation).
        uncertainty_weight: Score subtracted per unit of variance.
    """
    if pooling == "min":
        return scores.amin(1)
    mean = scores.mean(1)
    if pooling == "mean":
        return mean
    return mean - uncertainty_weight * scores.var(1, correction=0)


def check_pooling(pooling: str) -> None:
    """Refuse a pooling that `pool` does not know.

    Raises:
        InputError: There is no such pooling.
    """
    if pooling not in get_args(Pooling):
        raise InputError(f"pooling must be one of {get_args(Pooling)}, not {pooling!r}")


class RewardEnsemble:
    """Members that share a tokenizer, each normalised separately, pooled into one score.

    Args:
        members: Reward models; a model with M heads counts as M.
        pooling: As in `pool`.
        uncertainty_weight: As in `pool`.

    Raises:
        InputError: The members' tokenizers differ, or the pooling is unknown.
    """

    def __init__(
        self,
        members: Sequence[RewardModel],
        pooling: Pooling = "mean",
        uncertainty_weight: float = 1.0,
    ) -> None:
        check_pooling(pooling)
        vocabularies = [member.tokenizer.get_vocab() for member in members]
        if any(vocabulary != vocabularies[0] for vocabulary in vocabularies):
            raise InputError(
                "the members of an ensemble must share a tokenizer; "
                + " and ".join(repr(m.model.name_or_path) for m in members)
                + " do not"
            )
        reading = [(m.causal, m.tokenizer.chat_template, m.closing(chat=False)) for m in members]
        if any(one != reading[0] for one in reading):
            raise InputError(
                "the members of an ensemble must read one row: "
                + " and ".join(repr(m.model.name_or_path) for m in members)
                + " differ in their chat template, their EOS, or one of them is no causal model"
            )
        self.members = tuple(members)
        self.pooling, self.uncertainty_weight = pooling, uncertainty_weight

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The members' tokenizer."""
        return self.members[0].tokenizer

    @property
    def heads(self) -> int:
        """M: the heads of all members."""
        return sum(member.heads for member in self.members)

    @property
    def device(self) -> torch.device:
        """The members' device."""
        return self.members[0].device

    @property
    def context(self) -> int | None:
        """The smallest of the members' contexts, in tokens; None if nothing says."""
        return min((m.context for m in self.members if m.context is not None), default=None)

    def member_scores(self, tokens: Tensor) -> Tensor:
        """Every member's score, no gradient: (B, L) -> (B, M)."""
        return torch.cat([member.member_scores(tokens) for member in self.members], 1)

    def pooled(self, scores: Tensor) -> Tensor:
        """Pool the members' scores: (B, M) -> (B,)."""
        return pool(scores, self.pooling, self.uncertainty_weight)

    def encode(self, prompt: Prompt, response: str, *, finished: bool = False) -> list[int]:
        """Ids of a prompt and a response (see `RewardModel.encode`)."""
        return self.members[0].encode(prompt, response, finished=finished)

    def chat_ids(self, prompt: Prompt) -> list[int] | None:
        """A chat prompt's ids by the members' template (see `RewardModel.chat_ids`)."""
        return self.members[0].chat_ids(prompt)

    def closing(self, *, chat: bool) -> list[int]:
        """The end with which the members read a finished response (see `RewardModel.closing`)."""
        return self.members[0].closing(chat=chat)
