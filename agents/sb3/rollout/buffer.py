"""A rollout buffer of whole sequences: one forward pass per episode, not one per token."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from rlhf_gym.tokens import PAD, Sequences, pad_rows

QUANTITIES = ("values", "log_probs", "advantages", "returns", "ref_log_probs")
"""What the buffer stores for each token, in the order of `SequenceSamples`."""


class SequenceSamples(NamedTuple):
    """A minibatch of whole sequences, named as SB3's own (`RolloutBufferSamples`).

    Attributes:
        observations: The sequences, M chosen tokens in all.
        actions: (M,) those tokens.
        old_values: (M,) values at the rollout.
        old_log_prob: (M,) log π at the rollout.
        advantages: (M,).
        returns: (M,).
        ref_log_prob: (M,) log π_ref, where the rollout had it; else 0.
    """

    observations: Sequences
    actions: Tensor
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    ref_log_prob: Tensor

    def rows(self, part: Sequences, places: Tensor) -> "SequenceSamples":
        """The samples of some of its sequences.

        Args:
            part: Some of the sequences.
            places: Where their chosen tokens are among all M.
        """
        return SequenceSamples(part, *(flat[places] for flat in self[1:]))


class SequenceRolloutBuffer(RolloutBuffer):
    """Stores actions, and observations only where a segment starts; yields `Sequences`.

    A segment is a run of steps of one environment within one episode: it starts at the rollout's
    first step or at an episode's start, so partial episodes and auto-reset need no care. The grid
    of (steps, environments) is SB3's own, and so is its GAE. `batch_size` counts tokens, about: a
    minibatch holds whole segments. Memory grows with tokens, not with tokens × context.
    """

    ref_log_probs: npt.NDArray[np.float32]

    def reset(self) -> None:
        """Empty the grid."""
        shape = (self.buffer_size, self.n_envs)
        self.actions = np.full(shape, PAD, dtype=np.int64)
        for name in (*QUANTITIES, "rewards"):
            setattr(self, name, np.zeros(shape, dtype=np.float32))
        self.episode_starts = np.ones(shape, dtype=np.float32)
        # (step, environment) of each segment's start -> the row of tokens it starts from
        self._prefixes: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        self.generator_ready = False
        self.pos, self.full = 0, False

    def add(
        self,
        obs: npt.NDArray[np.int64],
        action: npt.NDArray[np.int64],
        reward: npt.NDArray[np.float32],
        episode_start: npt.NDArray[np.float32],
        value: Tensor,
        log_prob: Tensor,
    ) -> None:
        """Add one step of every environment."""
        at = self.pos
        for env in range(self.n_envs):
            if at == 0 or episode_start[env]:
                self._prefixes[at, env] = obs[env][obs[env] != PAD].copy()
        self.actions[at] = action.reshape(self.n_envs)
        self.rewards[at] = reward
        self.episode_starts[at] = episode_start
        self.values[at] = value.detach().cpu().numpy().flatten()
        self.log_probs[at] = log_prob.detach().cpu().numpy().flatten()
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def add_responses(
        self,
        prompts: npt.NDArray[np.int64],
        actions: npt.NDArray[np.int64],
        rewards: npt.NDArray[np.floating],
        values: npt.NDArray[np.floating],
        log_probs: npt.NDArray[np.floating],
        ref_log_probs: npt.NDArray[np.floating] | None = None,
    ) -> None:
        """Add one whole response of every environment: prompts (N, P), the rest (N, T).

        Cells behind a response's end stay empty: value and reward 0 and an episode start, so
        that they reach no advantage.
        """
        steps = actions.shape[1]
        block = slice(self.pos, self.pos + steps)
        for env, row in enumerate(prompts):
            self._prefixes[self.pos, env] = row[row != PAD].copy()
        self.actions[block] = actions.T
        mask = actions.T != PAD
        self.rewards[block] = np.where(mask, rewards.T, 0)
        self.values[block] = np.where(mask, values.T, 0)
        self.log_probs[block] = np.where(mask, log_probs.T, 0)
        if ref_log_probs is not None:
            self.ref_log_probs[block] = np.where(mask, ref_log_probs.T, 0)
        self.episode_starts[block] = ~mask
        self.episode_starts[self.pos] = 1
        self.pos += steps
        self.full = self.pos == self.buffer_size

    def prompt(self, step: int, env: int) -> list[int]:
        """The tokens before the first action of the segment that starts there."""
        tokens: list[int] = self._prefixes[step, env].tolist()
        return tokens

    def get(self, batch_size: int | None = None, together: int = 1) -> Iterator[SequenceSamples]:  # type: ignore[override]
        """Shuffled minibatches of whole segments, of about `batch_size` tokens each.

        Args:
            batch_size: Tokens; None takes all at once.
            together: Segments of this many consecutive environments that start at the same step
                stay in one minibatch, one after the other.
        """
        assert self.full, "the buffer is not full yet"
        starts, environments, lengths, sequences = self._segments()
        order = _shuffled(starts, environments, together)
        total = int(lengths.sum())
        parts = 1 if batch_size is None else max(1, round(total / batch_size))
        # Cut where the running count of tokens passes k/parts of all.
        blocks = order.reshape(-1, together)
        sizes = lengths[blocks].sum(1)
        running = np.cumsum(sizes) - sizes / 2
        group = np.minimum((running * parts / total).astype(int), parts - 1)
        for k in range(parts):
            rows = blocks[group == k].flatten()
            if len(rows):
                yield self._minibatch(
                    starts[rows], environments[rows], sequences.rows(torch.from_numpy(rows))
                )

    @property
    def n_tokens(self) -> int:
        """Tokens held."""
        return int((self.actions != PAD).sum())

    def _segments(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], Sequences]:
        """Start step, environment and length of each segment, and its tokens."""
        places = sorted(self._prefixes, key=lambda place: (place[1], place[0]))
        starts = np.array([step for step, _ in places])
        environments = np.array([env for _, env in places])
        ends = np.append(starts[1:], self.buffer_size)
        ends[np.append(environments[1:] != environments[:-1], True)] = self.buffer_size
        runs = [self.actions[s:e, n] for s, e, n in zip(starts, ends, environments, strict=True)]
        runs = [run[run != PAD] for run in runs]
        prefixes = [self._prefixes[place] for place in places]
        rows = [np.concatenate(pair) for pair in zip(prefixes, runs, strict=True)]
        lengths = np.array([len(run) for run in runs])
        sequences = Sequences(
            torch.from_numpy(pad_rows(rows)),
            torch.tensor([len(prefix) for prefix in prefixes]),
            torch.from_numpy(lengths),
        )
        return starts, environments, lengths, sequences

    def _cells(
        self,
        starts: npt.NDArray[np.int64],
        environments: npt.NDArray[np.int64],
        sequences: Sequences,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Step and environment of each chosen token of some segments, (M,) each."""
        rows, columns = (part.numpy() for part in sequences.cells())
        return starts[rows] + columns - sequences.starts.numpy()[rows], environments[rows]

    def _minibatch(
        self,
        starts: npt.NDArray[np.int64],
        environments: npt.NDArray[np.int64],
        sequences: Sequences,
    ) -> SequenceSamples:
        cells = self._cells(starts, environments, sequences)
        # Trailing padding that no row of this minibatch needs costs compute in every layer.
        sequences = sequences._replace(tokens=sequences.tokens[:, : sequences.width])
        grids = (self.actions, *(getattr(self, name) for name in QUANTITIES))
        return SequenceSamples(
            sequences.to(self.device), *(self.to_torch(grid[cells]) for grid in grids)
        )


def _shuffled(
    starts: npt.NDArray[np.int64], environments: npt.NDArray[np.int64], together: int
) -> npt.NDArray[np.int64]:
    """A random order of segments in which those that belong together follow each other."""
    if together == 1:
        return np.random.permutation(len(starts))
    in_turn = np.lexsort((environments, starts))  # by step, then by environment
    blocks = in_turn.reshape(-1, together)
    order: npt.NDArray[np.int64] = blocks[np.random.permutation(len(blocks))].flatten()
    return order
