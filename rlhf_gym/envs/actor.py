"""Who acts: an action does not carry its log-probability, so the environment asks the actor."""

import os
import weakref
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Actor(Protocol):
    """Anything that knows log π of an action; usually the policy, answering from memory."""

    def log_prob(
        self, observations: npt.NDArray[np.int64], actions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Log π(action | observation), tempered and masked as the action was drawn.

        Args:
            observations: (N, L) int64, right-padded with PAD.
            actions: (N,) int64.

        Returns:
            (N,) float32.
        """
        ...


class ActorBinding:
    """A weak hold on the actor: it goes with the actor, and never into another process or copy."""

    def __init__(self, actor: Actor | None = None) -> None:
        self._actor = None if actor is None else weakref.ref(actor)
        self._process = os.getpid()

    def get(self) -> Actor | None:
        """The bound actor, None if there is none (any more).

        Raises:
            RuntimeError: It was bound in another process, where its log-probs mean nothing.
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

    def __getstate__(self) -> dict[str, object]:
        return {"_actor": None, "_process": os.getpid()}
