"""What sb3-contrib's MaskablePPO needs: a policy that takes masks, and a buffer that keeps them.

A mask is kept as the shorter of two lists, the ids it allows or those it bars, and nothing at all
where it allows what the policy's static mask does. Notation: N rows, M chosen tokens, V tokens.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from torch import Tensor

from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.policy.critic import Observations
from agents.sb3.rollout.buffer import SequenceRolloutBuffer
from rlhf_gym.lm.masks import Limits
from rlhf_gym.tokens import Sequences
from rlhf_gym.utils.arrays import Bools


class MaskedSamples(NamedTuple):
    """A minibatch as MaskablePPO reads it; see `agents.sb3.rollout.buffer.SequenceSamples`."""

    observations: Sequences
    actions: Tensor
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    action_masks: Limits


class MaskableCausalLMPolicy(CausalLMPolicy):
    """A `CausalLMPolicy` that is told in each state what it may choose."""

    _told: Limits | None = None

    def forward(
        self,
        obs: Tensor,
        deterministic: bool = False,
        action_masks: Bools | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Act in each state, masks (N, V): tokens (N,), values (N, 1), log-probs (N,)."""
        if action_masks is not None:
            self._told = limits_of(action_masks, self.core.mask.never).to(self.device)
        try:
            return super().forward(obs, deterministic)
        finally:
            self._told = None

    def evaluate_actions(  # type: ignore[override]
        self, obs: Observations, actions: Tensor, action_masks: Limits | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `CausalLMPolicy`'s, in states with these masks."""
        self._told = action_masks
        try:
            return super().evaluate_actions(obs, actions)
        finally:
            self._told = None

    def _limits(
        self, obs: Observations, hidden: Tensor, chosen: Tensor | None = None
    ) -> Limits | None:
        return super()._limits(obs, hidden, chosen) if self._told is None else self._told


# MaskablePPO asks for this class by name, and uses nothing of it that is not above.
MaskableActorCriticPolicy.register(MaskableCausalLMPolicy)


class MaskableSequenceRolloutBuffer(SequenceRolloutBuffer, MaskableRolloutBuffer):
    """A `SequenceRolloutBuffer` that keeps each state's mask as a list of ids.

    Args:
        *args: As in SB3's `RolloutBuffer`.
        never: Ids that the policy's own mask bars everywhere; no state's list has them.
        **options: As in SB3's `RolloutBuffer`.
    """

    def __init__(self, *args: Any, never: tuple[int, ...] = (), **options: Any) -> None:
        self.never = never
        super().__init__(*args, **options)

    def reset(self) -> None:
        """Empty the grid."""
        super().reset()
        self._lists: dict[tuple[int, int], tuple[npt.NDArray[np.int64], bool]] = {}

    def add(self, *args: Any, action_masks: Bools | None = None, **kwargs: Any) -> None:
        """Add one step of every environment, masks (N, V)."""
        if action_masks is not None:
            for env, mask in enumerate(action_masks):
                ids, barred = shorter(mask, self.never)
                if len(ids):
                    self._lists[self.pos, env] = ids, barred
        super().add(*args, **kwargs)

    def get(self, batch_size: int | None = None, together: int = 1) -> Iterator[MaskedSamples]:  # type: ignore[override]
        """Shuffled minibatches of whole segments, of about `batch_size` tokens each."""
        yield from super().get(batch_size, together)  # type: ignore[misc]  # from _minibatch

    def _minibatch(  # type: ignore[override]
        self,
        starts: npt.NDArray[np.int64],
        environments: npt.NDArray[np.int64],
        sequences: Sequences,
    ) -> MaskedSamples:
        batch = super()._minibatch(starts, environments, sequences)
        nothing = np.zeros(0, dtype=np.int64), True
        steps, rows = self._cells(starts, environments, sequences)
        places = zip(steps.tolist(), rows.tolist(), strict=True)
        lists = [self._lists.get(place, nothing) for place in places]
        limits = Limits.of([ids for ids, _ in lists], [barred for _, barred in lists])
        return MaskedSamples(*batch[:6], limits.to(self.device))


def shorter(mask: Bools, never: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], bool]:
    """The ids that a mask (V,) allows, or those it bars if they are fewer; and which of the two.

    Ids of `never` count as allowed: they are barred elsewhere.
    """
    mask = np.array(mask, dtype=np.bool_)
    mask[list(never)] = True
    barred = 2 * int(mask.sum()) > len(mask)
    return np.flatnonzero(~mask if barred else mask), barred


def limits_of(masks: Bools, never: tuple[int, ...]) -> Limits:
    """Masks (N, V) as limits."""
    lists = [shorter(mask, never) for mask in masks]
    return Limits.of([ids for ids, _ in lists], [barred for _, barred in lists])
