"""Who acts in an environment, and how likely its actions were.

A `Discrete` action does not carry its log-probability, but every token pays for it. A policy of
this project announces what it chooses (`rlhf_gym.envs.acts`), and an environment recognises its own
step among what was announced. Whoever acts is bound by acting: through wrappers, and after every
`load`, `set_env` or change of environment, without a call. An agent that does not announce is bound
with `bind_actor`, or pays its half of the KL penalty itself. Notation: N rows, L columns.
"""

import logging
import multiprocessing
import os
import weakref

import numpy as np

from rlhf_gym.envs.acts import (
    Act,
    Actor,
    Log,
    acts_since,
    announces,
    explorers_since,
    is_copy,
    look_up,
    next_number,
    saw,
)
from rlhf_gym.errors import InputError
from rlhf_gym.utils.arrays import Bools, Ints

__all__ = ["Actor", "ActorBinding"]

logger = logging.getLogger(__name__)

HALF = (
    "it pays score + kl_coef * log π_ref, and the agent owes -kl_coef * log π. "
    "env.unwrapped.bind_actor(actor) binds an agent of yours, bind_actor(None) says that it pays "
    "its half itself"
)


class ActorBinding:
    """Who acts in one environment: whoever was bound, until another is seen to act there.

    The reference to the actor is weak, because a policy usually has one to its environment too. It
    is dropped on pickle and copy, and refused in another process.
    """

    def __init__(self) -> None:
        self._actor: weakref.ref[Actor] | None = None
        self._process = os.getpid()
        self._since = next_number()
        self._named = False  # by the user, also if it is nobody
        self._said: set[str] = set()

    def bind(self, actor: Actor | None, *, named: bool = True) -> None:
        """Bind an actor; None unbinds.

        Args:
            actor: The actor.
            named: Whether the user names it, or nobody. Who is named and does not announce, or
                nobody, stays bound whoever else acts.

        Raises:
            InputError: It is a copy that has not acted.
        """
        if actor is not None and is_copy(actor):
            raise InputError(
                "this actor is a copy (from a pickle or a deepcopy) that has not acted: its "
                "weights do not follow those of the policy that acts. Step the environment in the "
                "policy's own process (gymnasium.make_vec(id, num_envs=N) is one batch without "
                "processes), or bind nobody and let the agent add its half of the KL penalty"
            )
        foreign = actor is not None and not announces(actor)
        if named and foreign and multiprocessing.parent_process() is not None:
            self._say(
                "an actor was bound in a process of its own: it must be the one that acts in this "
                "process, and not a copy of one that acts elsewhere"
            )
        self._actor = None if actor is None else weakref.ref(actor)
        self._process, self._named = os.getpid(), named

    def observed(self) -> None:
        """Only what is chosen from now on can be a choice in the present observations."""
        self._since = next_number()

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

        Args:
            observations: (N, L) the present ones.
            actions: (N,).
            rows: (N,) which rows act; the others are about to start a new prompt.

        Returns:
            (N,) float32, of no meaning in the other rows; None if nobody is bound.

        Raises:
            InputError: It cannot be known whose step this is.
        """
        acts, states, taken = acts_since(self._since), observations[rows], actions[rows]
        looked_up = {actor: look_up(own, states, taken) for actor, own in acts.items()}
        chosen = [actor for actor, (_, known) in looked_up.items() if known.all()]
        bound = self._acting(chosen, acts, states) if rows.any() else self.get()
        if bound is None:
            return None
        if bound not in looked_up:
            return np.asarray(bound.log_prob(observations, actions), dtype=np.float32)
        # What it announced may have been drawn under a mask, or greedily; only the rest is asked.
        found, known = np.zeros(len(actions), dtype=np.float32), ~rows
        found[rows], known[rows] = looked_up[bound]
        if not known.all():
            found[~known] = bound.log_prob(observations[~known], actions[~known])
        return found

    def _acting(
        self, chosen: list[Actor], acts: dict[Actor, list[Act]], observations: Ints
    ) -> Actor | None:
        """Whose step this is; it is bound.

        Args:
            chosen: Those who have chosen these actions since the last observations.
            acts: All that was announced since then.
            observations: (N, L) those of the rows that act.
        """
        bound = self.get()
        if bound in chosen:
            return bound
        # An actor of the user's that announces nothing cannot be told from a spectator's view.
        fixed = self._named and (bound is None or not announces(bound))
        if chosen and fixed:
            self._say(f"a policy acts here, but {_name(bound)} was bound by name: {HALF}")
        if fixed:
            return bound
        if chosen:
            return self._take(chosen)
        return self._unannounced(bound, acts, observations)

    def _unannounced(
        self, bound: Actor | None, acts: dict[Actor, list[Act]], observations: Ints
    ) -> Actor | None:
        """Whose step this is if nobody announced these actions."""
        # Those who chose other actions here: a wrapper or an exploration has exchanged them.
        seen = [actor for actor, own in acts.items() if saw(own, observations)]
        if bound is not None and (bound in seen or (self._named and seen)):
            return bound
        if seen:
            return self._take(seen if bound is None else [*seen, bound])
        explorers = [actor for actor in explorers_since(self._since) if actor is not bound]
        if explorers:
            return self._take(explorers)
        if acts and bound not in acts:
            self._say(
                "a policy has acted since this environment gave out its observations, but not on "
                f"them (something changed them, or it acts elsewhere); {_name(bound)} is bound "
                "here. Call env.unwrapped.bind_actor(policy) to say whose step this is"
            )
        elif bound is None:
            self._say(f"nobody is known to act in this environment: {HALF}", once=True)
        return bound

    def _take(self, acting: list[Actor]) -> Actor:
        """Bind the one that acts.

        Raises:
            InputError: There are several.
        """
        if len(acting) > 1:
            raise InputError(
                f"{len(acting)} policies have acted in these states, so it is not known whose "
                "step this is: call env.unwrapped.bind_actor(policy) first"
            )
        self.bind(acting[0], named=False)
        return acting[0]

    def _say(self, what: str, *, once: bool = False) -> None:
        """Log a warning, the first time in this environment, or `once` in this process."""
        said = _said if once else self._said
        if what not in said:
            said.add(what)
            logger.warning(what)

    def __getstate__(self) -> dict[str, object]:
        # The observations that were given out are the copy's, too.
        return {
            "_actor": None,
            "_process": os.getpid(),
            "_since": self._since,
            "_named": self._named and self._actor is None,
            "_said": set(self._said),
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self._process != os.getpid():  # its numbers are not ours
            self._process, self._since = os.getpid(), next_number()


_said: set[str] = set()  # in this process


def _name(actor: Actor | None) -> str:
    return "nobody" if actor is None else f"a {type(actor).__name__}"
