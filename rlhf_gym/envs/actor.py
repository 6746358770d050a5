"""Who acts, and how likely its actions were.

A `Discrete` action does not carry its log-probability, but every token pays for it. So a policy
announces what it has just chosen (`announce`), and an environment recognises its own step among
what was announced (`ActorBinding`). Whoever acts is bound by acting: through every wrapper that
leaves observations and actions as they are, and after every `load`, `set_env` or change of
environment, without a call. An agent that does not announce is bound with `bind_actor`, or pays its
half of the KL penalty itself. Notation: N rows, L columns.
"""

import itertools
import logging
import multiprocessing
import os
import weakref
from collections import deque
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rlhf_gym.errors import InputError
from rlhf_gym.utils.arrays import Bools, Ints

logger = logging.getLogger(__name__)

Log = npt.NDArray[np.float32]

KEPT = 8
"""Acts that are remembered. A policy that steps several environments in turn needs one for each."""


class Actor(Protocol):
    """Anything that knows log π of an action; usually the policy, which remembers it."""

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
    """What an actor chose in one forward pass.

    That pass has computed the log-probs of its actions. Looking them up by the row's content costs
    no second pass, and works whichever rows an environment asks for.

    Args:
        actor: Who chose; held weakly.
        observations: (N, L) int64.
        actions: (N,) int64.
        log_probs: (N,) float32; 0 where the actor is deterministic.
    """

    def __init__(self, actor: Actor, observations: Ints, actions: Ints, log_probs: Log) -> None:
        self._actor = weakref.ref(actor)
        self.number = next(_numbers)
        self._observations, self._actions, self._log_probs = observations, actions, log_probs

    @property
    def actor(self) -> Actor | None:
        """Who chose; None if it no longer exists."""
        return self._actor()

    def look_up(self, observations: Ints, actions: Ints) -> tuple[Log, Bools]:
        """Log-probs (N,) and whether each is known (N,)."""
        same = observations.shape == self._observations.shape and np.array_equal(
            actions, self._actions
        )
        if same and np.array_equal(observations, self._observations):
            return self._log_probs.copy(), np.ones(len(actions), dtype=np.bool_)
        rows = zip(observations, actions, strict=True)
        found = [self._table.get((row.tobytes(), int(action))) for row, action in rows]
        known = np.array([p is not None for p in found], dtype=np.bool_)
        return np.array([p or 0.0 for p in found], dtype=np.float32), known

    def saw(self, observations: Ints) -> bool:
        """Whether it chose an action in every one of these states (N, L)."""
        states = {state for state, _ in self._table}
        return all(row.tobytes() in states for row in observations)

    @cached_property
    def _table(self) -> dict[tuple[bytes, int], float]:
        rows = zip(self._observations, self._actions, self._log_probs, strict=True)
        return {(row.tobytes(), int(action)): float(p) for row, action, p in rows}


_numbers = itertools.count(1)
_acts: deque[Act] = deque(maxlen=KEPT)  # the newest last
_copies: "weakref.WeakSet[Actor]" = weakref.WeakSet()
# A forked process starts without acts: its copies of the actors have chosen nothing.
os.register_at_fork(after_in_child=_acts.clear)


def announce(actor: Actor, observations: Ints, actions: Ints, log_probs: Log) -> Act:
    """Say what `actor` has just chosen, so that the environment which takes it binds the actor.

    Args:
        actor: Who chose.
        observations: (N, L) int64, as the environment gave them.
        actions: (N,) int64.
        log_probs: (N,) float32; 0 where the actor is deterministic.
    """
    _copies.discard(actor)  # who acts here is nobody's stale copy
    act = Act(actor, observations, actions, log_probs)
    _acts.append(act)
    return act


def mark_as_copy(actor: Actor) -> None:
    """Say that `actor` came out of a pickle or a deepcopy, and has not acted since."""
    _copies.add(actor)


class ActorBinding:
    """Who acts in one environment: whoever was bound, until another is seen to act there.

    The reference to the actor is weak, because a policy usually has one to its environment too. It
    is dropped on pickle and copy, and refused in another process.
    """

    def __init__(self) -> None:
        self._actor: weakref.ref[Actor] | None = None
        self._process = os.getpid()
        self._since = next(_numbers)
        self._told = False

    def bind(self, actor: Actor | None) -> None:
        """Bind an actor by name; None unbinds.

        Raises:
            InputError: It is a copy that has not acted.
        """
        if actor is not None and actor in _copies:
            raise InputError(
                "this actor is a copy (from a pickle or a deepcopy) that has not acted: its "
                "weights do not follow those of the policy that acts. Step the environment in the "
                "policy's own process (gymnasium.make_vec(id, num_envs=N) is one batch without "
                "processes), or bind nobody and let the agent add its half of the KL penalty"
            )
        self._actor = None if actor is None else weakref.ref(actor)
        self._process, self._told = os.getpid(), True

    def observed(self) -> None:
        """Only what is chosen from now on can be a choice in the present observations."""
        self._since = next(_numbers)

    def get(self) -> Actor | None:
        """The bound actor; None if nobody was bound or the actor no longer exists.

        Raises:
            RuntimeError: It was bound in another process; its weights here would be stale.
        """
        if self._actor is None:
            return None
        if self._process != os.getpid():
            raise RuntimeError(
                "an actor was bound before this process was forked; its weights here are a stale "
                "copy. Bind one in this process (env.unwrapped.bind_actor), or bind none and let "
                "the agent add its half of the KL penalty"
            )
        return self._actor()

    def log_probs(self, observations: Ints, actions: Ints, rows: Bools) -> Log | None:
        """Log π (N,) of a step's actions by whoever acts, who is bound from now on.

        Those who announced these actions in these states act; else those who chose others there,
        so that the actions were exchanged on the way; else whoever is bound.

        Args:
            observations: (N, L) the present ones.
            actions: (N,).
            rows: (N,) which rows act; the others are about to start a new prompt.

        Returns:
            (N,) float32, of no meaning in the other rows; None if nobody announced anything and
            nobody is bound.

        Raises:
            InputError: Two unbound actors have acted alike in these states.
        """
        bound = self.get()
        chosen, seen = self._acting(observations[rows], actions[rows]) if rows.any() else ({}, [])
        acting = list(chosen) or seen
        if acting and bound not in acting:
            if len(acting) > 1:
                raise InputError(
                    f"{len(acting)} policies have acted in these states, so it is not known whose "
                    "step this is: call env.unwrapped.bind_actor(policy) first"
                )
            (bound,) = acting
            self.bind(bound)
        if bound is None:
            self._warn_in_a_worker()
            return None
        if bound in chosen:
            found = np.zeros(len(actions), dtype=np.float32)
            found[rows] = chosen[bound]
            return found
        return np.asarray(bound.log_prob(observations, actions), dtype=np.float32)

    def _acting(self, observations: Ints, actions: Ints) -> tuple[dict[Actor, Log], list[Actor]]:
        """Who has chosen these actions since the last observations, and who has seen these."""
        chosen: dict[Actor, Log] = {}
        seen: list[Actor] = []
        for act in reversed(_acts):
            actor = act.actor
            if act.number < self._since:
                break
            if actor is None or actor in chosen:
                continue
            found, known = act.look_up(observations, actions)
            if known.all():
                chosen[actor] = found
            elif actor not in seen and act.saw(observations):
                seen.append(actor)
        return chosen, seen

    def _warn_in_a_worker(self) -> None:
        # In one process the policy of this project would have announced what it chose. An agent
        # that pays its half itself says so by binding None.
        if not self._told and multiprocessing.parent_process() is not None:
            self._told = True
            logger.warning(
                "this environment steps in a process of its own, where it cannot see who acts: it "
                "pays score + kl_coef * log π_ref, and the agent owes -kl_coef * log π. Unless the "
                "agent adds that, use gymnasium.make_vec(id, num_envs=N), one batch without "
                "processes; env.unwrapped.bind_actor(None) says that it does"
            )

    def __getstate__(self) -> dict[str, object]:
        return {"_actor": None, "_process": os.getpid(), "_since": 0, "_told": self._told}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._since, self._process = next(_numbers), os.getpid()
