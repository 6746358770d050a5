"""NLPO: PPO that may only choose what a lagged copy of itself finds likely. ``--algorithm nlpo``.

Ramamurthy et al. 2023, "Is Reinforcement Learning (Not) for Natural Language Processing?". The mask
is the top-p set of a copy of the policy, which is replaced every `mask_every` updates. It restricts
sampling and every log-prob during training; the saved policy has no mask.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from agents import ppo
from agents.sb3.learning.learner import SB3Learner, response_learner
from agents.sb3.options import ResponseOptions
from agents.sb3.response_ppo import PPO
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.lm.causal_lm import CausalLM

ROLLOUTS = "rollouts"


@dataclass(frozen=True)
class Config(ppo.Config):
    """Options of NLPO."""

    top_p: float = 0.95
    """Probability mass of the lagged policy's likeliest tokens that may be chosen."""
    mask_every: int = 5
    """Updates between two renewals of the lagged policy, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_every < 1:
            raise InputError(f"mask_every must be at least 1 update, not {self.mask_every}")


class NLPO(PPO):
    """PPO under the top-p set of a lagged copy of the policy."""

    Options: ClassVar[type[ResponseOptions]] = Config
    options: Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lagged: CausalLM | None = None
        self._rollouts = 0
        super().__init__(*args, **kwargs)

    def _prepare_rollout(self) -> None:
        """Renew the mask when its time has come."""
        if self._lagged is None or self._rollouts % self.options.mask_every == 0:
            self._follow(self.policy.snapshot())
        self._rollouts += 1

    def learn(self, *args: Any, **options: Any) -> "NLPO":
        """Learn; afterwards the policy is without its mask, under the environment's alone."""
        try:
            super().learn(*args, **options)
        finally:
            self._lagged = None
            self.policy.follow(self.env.get_attr("objective")[0].reference)  # type: ignore[union-attr]
        return self

    def extra_state(self) -> dict[str, Tensor]:
        """What the lagged policy has learned, and how many rollouts there were."""
        count = {ROLLOUTS: torch.tensor(self._rollouts)}
        if self._lagged is None:
            return count
        # Frozen weights are the reference's own.
        learn = {name for name, p in self.policy.lm.named_parameters() if p.requires_grad}
        weights = self._lagged.model.named_parameters()
        return count | {name: p for name, p in weights if name in learn}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Go on under the same mask."""
        self._rollouts = int(state.pop(ROLLOUTS))
        if state:
            lagged = self.policy.snapshot()
            lagged.model.load_state_dict(state, strict=False)
            self._follow(lagged)

    def _follow(self, lagged: CausalLM) -> None:
        """Restrict the policy to what `lagged` finds likely."""
        reference: CausalLM = self.token_env.objective.reference
        if reference.mask.follows_reference:
            raise InputError(
                "nlpo restricts the policy to its own top-p set; the environment has a top_k or "
                "top_p of the reference already: leave one of the two out"
            )
        mask = replace(reference.mask, top_p=self.options.top_p)
        self._lagged = replace(lagged, mask=mask, guide=None)
        self.policy.follow(self._lagged)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_lagged"]


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    return response_learner(NLPO, config, env)
