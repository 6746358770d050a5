"""Policy and rollout buffer for sb3-contrib's MaskablePPO: both take a mask per state.

The buffer stores a mask as a list of ids: those it allows or those it bars, whichever is shorter.
It stores nothing for a mask that equals the policy's static mask. Dense masks would take V bytes
per token. Notation: N rows, M chosen tokens, V tokens in the vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from torch import Tensor

from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.policy.critic import Observations
from agents.sb3.policy.distribution import TokenDistribution
from agents.sb3.rollout.buffer import SequenceRolloutBuffer
from rlhf_gym.lm.masks import Limits
from rlhf_gym.tokens import Sequences
from rlhf_gym.utils.arrays import Bools


class MaskedSamples(NamedTuple):
    """A minibatch for MaskablePPO; see `agents.sb3.rollout.buffer.SequenceSamples`."""

    observations: Sequences
    actions: Tensor
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    action_masks: Limits


Masks = Limits | Bools | Tensor
"""Limits, or True for each token that may be chosen: (M, V), or (V,) for one state."""


class MaskableCausalLMPolicy(CausalLMPolicy):
    """A `CausalLMPolicy` that gets a mask of the allowed tokens with each state."""

    _told: Limits | None = None

    def forward(
        self,
        obs: Tensor,
        deterministic: bool = False,
        action_masks: Masks | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Act under masks (N, V); return tokens (N,), values (N, 1) and log-probs (N,)."""
        with self._under(action_masks):
            return super().forward(obs, deterministic)

    def predict(
        self,
        observation: npt.NDArray[Any] | dict[str, npt.NDArray[Any]],
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[Any] | None = None,
        deterministic: bool = False,
        action_masks: Masks | None = None,
    ) -> tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], ...] | None]:
        """Choose tokens as in SB3, under masks: (V,) for one observation, else (N, V)."""
        with self._under(action_masks):
            return super().predict(observation, state, episode_start, deterministic)

    def get_distribution(  # type: ignore[override]
        self, obs: Observations, action_masks: Masks | None = None
    ) -> TokenDistribution:
        """The next-token distribution in each state, under masks (N, V)."""
        with self._under(action_masks):
            return super().get_distribution(obs)

    def evaluate_actions(  # type: ignore[override]
        self, obs: Observations, actions: Tensor, action_masks: Masks | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Evaluate actions like `CausalLMPolicy`, under these masks (M, V)."""
        with self._under(action_masks):
            return super().evaluate_actions(obs, actions)

    @contextmanager
    def _under(self, masks: Masks | None) -> Iterator[None]:
        """Apply these masks inside the block; without masks, those of an outer block stay."""
        before = self._told
        if isinstance(masks, Limits):
            self._told = masks
        elif masks is not None:
            dense = np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks, dtype=np.bool_)
            rows = dense.reshape(-1, self.core.vocab_size)
            self._told = limits_of(rows, self.core.mask.never).to(self.device)
        try:
            yield
        finally:
            self._told = before

    def _limits(
        self, obs: Observations, hidden: Tensor, chosen: Tensor | None = None
    ) -> Limits | None:
        return super()._limits(obs, hidden, chosen) if self._told is None else self._told


# MaskablePPO checks for this base class, but only calls the methods that are defined above.
MaskableActorCriticPolicy.register(MaskableCausalLMPolicy)


class MaskableSequenceRolloutBuffer(SequenceRolloutBuffer, MaskableRolloutBuffer):
    """A `SequenceRolloutBuffer` that keeps each state's mask as a list of ids.

    Args:
        *args: As in SB3's `RolloutBuffer`.
        never: Ids that the policy's own mask bars in every state; they are in no list.
        **options: As in SB3's `RolloutBuffer`.
    """

    def __init__(self, *args: Any, never: tuple[int, ...] = (), **options: Any) -> None:
        self.never = never
        super().__init__(*args, **options)

    def reset(self) -> None:
        """Empty the buffer."""
        super().reset()
        self._lists: dict[tuple[int, int], tuple[npt.NDArray[np.int64], bool]] = {}

    def add(self, *args: Any, action_masks: Bools | None = None, **kwargs: Any) -> None:
        """Add one step of every environment, with masks (N, V)."""
        if action_masks is not None:
            for env, mask in enumerate(action_masks):
                ids, barred = shorter(mask, self.never)
                if len(ids):
                    self._lists[self.pos, env] = ids, barred
        super().add(*args, **kwargs)

    def get(self, batch_size: int | None = None, together: int = 1) -> Iterator[MaskedSamples]:  # type: ignore[override]
        """Yield shuffled minibatches of whole segments, with about `batch_size` tokens each."""
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
    """Return the ids that a mask (V,) allows, or those it bars if they are fewer.

    Ids in `never` count as allowed, because the policy's static mask bars them already.

    Returns:
        The ids, and True if they are the barred ones.
    """
    mask = np.array(mask, dtype=np.bool_)
    mask[list(never)] = True
    barred = 2 * int(mask.sum()) > len(mask)
    return np.flatnonzero(~mask if barred else mask), barred


def limits_of(masks: Bools, never: tuple[int, ...]) -> Limits:
    """Return masks (N, V) as limits."""
    lists = [shorter(mask, never) for mask in masks]
    return Limits.of([ids for ids, _ in lists], [barred for _, barred in lists])
