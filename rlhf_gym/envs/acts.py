"""What the policies of this process have chosen last, as they announced it.

Notation: N rows, L columns of an observation.
"""

import itertools
import os
import threading
import weakref
from collections import deque
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rlhf_gym.tokens import PAD
from rlhf_gym.utils.arrays import Bools, Ints

Log = npt.NDArray[np.float32]

MOST_ROWS = 4096
"""Rows that are remembered of each actor: those of the environments that it steps in turn."""
LEAST_ACTS = 2
"""Acts that are remembered however many rows they have."""


class Actor(Protocol):
    """Anything that knows log π of an action; usually the policy."""

    def log_prob(self, observations: Ints, actions: Ints) -> Log:
        """Log π(action | observation), with the temperature and mask that it was drawn with.

        Args:
            observations: (N, L) int64, right-padded with PAD.
            actions: (N,) int64.

        Returns:
            (N,) float32.
        """
        ...


class Act:
    """What an actor chose in one forward pass, which has computed the log-probs of its choice.

    Args:
        observations: (N, L) int64.
        actions: (N,) int64.
        log_probs: (N,) float32; 0 where the actor is deterministic.
    """

    def __init__(self, observations: Ints, actions: Ints, log_probs: Log) -> None:
        self.number = next_number()
        # Copies: a wrapper may change the caller's arrays in place on the way.
        self.observations, self.actions = observations.copy(), actions.copy()
        self.log_probs = log_probs.copy()

    @cached_property
    def table(self) -> dict[tuple[bytes, int], float]:
        """Log-prob by state and action. A wrapper may add or cut padding, so it is no key."""
        rows = zip(self.observations, self.actions, self.log_probs, strict=True)
        return {(_state(row), int(action)): float(p) for row, action, p in rows}

    @cached_property
    def states(self) -> set[bytes]:
        """The states in which it chose."""
        return {state for state, _ in self.table}


class Acts:
    """The recent acts of one actor, the newest last."""

    def __init__(self) -> None:
        self._acts: deque[Act] = deque()
        self._rows = 0

    def add(self, act: Act) -> None:
        """Remember an act, and forget the oldest."""
        self._acts.append(act)
        self._rows += len(act.actions)
        while len(self._acts) > LEAST_ACTS and self._rows > MOST_ROWS:
            self._rows -= len(self._acts.popleft().actions)

    def since(self, number: int) -> list[Act]:
        """The acts after a number, the newest first."""
        return [act for act in reversed(self._acts) if act.number > number]


def look_up(acts: list[Act], observations: Ints, actions: Ints) -> tuple[Log, Bools]:
    """Log-probs (N,) of actions in states, and whether each was chosen in one of the acts (N,).

    Args:
        acts: At least one, the newest first.
        observations: (N, L).
        actions: (N,).
    """
    newest = acts[0]
    if np.array_equal(newest.actions, actions) and np.array_equal(
        newest.observations, observations
    ):  # the common case, which needs no table
        return newest.log_probs.copy(), np.ones(len(actions), dtype=np.bool_)
    found, known = np.zeros(len(actions), dtype=np.float32), np.zeros(len(actions), dtype=np.bool_)
    keys = [(_state(row), int(action)) for row, action in zip(observations, actions, strict=True)]
    for act in acts:
        for i in np.flatnonzero(~known).tolist():
            if keys[i] in act.table:
                found[i], known[i] = act.table[keys[i]], True
    return found, known


def saw(acts: list[Act], observations: Ints) -> bool:
    """Whether something was chosen in every one of these states (N, L)."""
    return all(any(_state(row) in act.states for act in acts) for row in observations)


def _state(row: Ints) -> bytes:
    state: bytes = row[row != PAD].astype(np.int64).tobytes()
    return state


_numbers = itertools.count(1)
_lock = threading.Lock()
_ledger: "weakref.WeakKeyDictionary[Actor, Acts]" = weakref.WeakKeyDictionary()
_present: "weakref.WeakKeyDictionary[Actor, int]" = weakref.WeakKeyDictionary()
_announcing: "weakref.WeakSet[Actor]" = weakref.WeakSet()
_copies: "weakref.WeakSet[Actor]" = weakref.WeakSet()


def next_number() -> int:
    """A number above all before it: of an act, or of the moment that observations are given out."""
    return next(_numbers)


def announce(actor: Actor, observations: Ints, actions: Ints, log_probs: Log) -> None:
    """Say what `actor` has just chosen, so that the environment which takes it binds the actor.

    Args:
        actor: Who chose.
        observations: (N, L) int64, as the environment gave them.
        actions: (N,) int64.
        log_probs: (N,) float32; 0 where the actor is deterministic.
    """
    act = Act(observations, actions, log_probs)
    with _lock:
        _copies.discard(actor)  # who acts here is nobody's stale copy
        _ledger.setdefault(actor, Acts()).add(act)


def announce_exploration(actor: Actor) -> None:
    """Say that the next step may be a random one on behalf of `actor`, which sees no observation.

    Value-based agents of Stable-Baselines3 explore without a word to their policy.
    """
    with _lock:
        _present[actor] = next_number()


def will_announce(actor: Actor) -> None:
    """Say that `actor` announces whatever it chooses, so that silence is somebody else's."""
    _announcing.add(actor)


def announces(actor: Actor) -> bool:
    """Whether it announces what it chooses."""
    return actor in _announcing or actor in _ledger


def acts_since(number: int) -> dict[Actor, list[Act]]:
    """The acts after a number, by actor; each one's newest first."""
    with _lock:
        found = {actor: acts.since(number) for actor, acts in _ledger.items()}
    return {actor: acts for actor, acts in found.items() if acts}


def explorers_since(number: int) -> list[Actor]:
    """Who has announced an exploration after a number."""
    with _lock:
        return [actor for actor, said in _present.items() if said > number]


def mark_as_copy(actor: Actor) -> None:
    """Say that `actor` came out of a pickle or a deepcopy; it is a copy until it acts."""
    _copies.add(actor)
    will_announce(actor)


def is_copy(actor: Actor) -> bool:
    """Whether it came out of a pickle or a deepcopy, and has not acted since."""
    return actor in _copies


def _forget() -> None:
    # A forked process starts without acts: its copies of the actors have chosen nothing. Another
    # thread may have held the lock when it was forked.
    global _lock
    _lock = threading.Lock()
    _ledger.clear()
    _present.clear()


os.register_at_fork(after_in_child=_forget)
