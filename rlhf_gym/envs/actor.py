"""The actor: an action does not include its log-probability, so the environment asks for it."""

import os
import weakref
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Actor(Protocol):
    """Anything that knows log π of an action; usually the policy, which remembers it."""

    def log_prob(
        self, observations: npt.NDArray[np.int64], actions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Log π(action | observation), with the temperature and mask that it was drawn with.

        Args:
            observations: (N, L) int64, right-padded with PAD.
            actions: (N,) int64.

        Returns:
            (N,) float32.
        """
        ...


class ActorBinding:
    """A weak reference to the actor, dropped on pickle and copy, refused in another process.

    Weak, because a policy usually has a reference to its environment too, and a strong one would
    keep both alive.
    """

    def __init__(self, actor: Actor | None = None) -> None:
        self._actor = None if actor is None else weakref.ref(actor)
        self._process = os.getpid()

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

    def __getstate__(self) -> dict[str, object]:
        return {"_actor": None, "_process": os.getpid()}
