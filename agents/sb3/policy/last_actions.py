"""The actions of the last forward pass and their log-probs, looked up by observation."""

import numpy as np
import numpy.typing as npt
from torch import Tensor


class LastActions:
    """What the last forward pass chose.

    The environment needs log π of each action for the KL penalty. The pass that chose the action
    has computed it; looking it up by the row's content costs no second pass, and works whichever
    rows the environment asks for.

    Args:
        observations: (N, L) int64.
        actions: (N,) int64.
        log_probs: (N,) float32.
    """

    def __init__(self, observations: Tensor, actions: Tensor, log_probs: Tensor) -> None:
        self._observations = observations.detach().cpu().numpy()
        self._actions = actions.detach().cpu().numpy()
        self._log_probs = log_probs.detach().cpu().numpy()
        self._table: dict[tuple[bytes, int], float] | None = None

    def look_up(
        self, observations: npt.NDArray[np.int64], actions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Log-probs (N,) and whether each is known (N,)."""
        same = observations.shape == self._observations.shape and np.array_equal(
            actions, self._actions
        )
        if same and np.array_equal(observations, self._observations):
            return self._log_probs.copy(), np.ones(len(actions), dtype=np.bool_)
        if self._table is None:
            rows = zip(self._observations, self._actions, self._log_probs, strict=True)
            self._table = {(row.tobytes(), int(a)): float(p) for row, a, p in rows}
        found = [
            self._table.get((row.tobytes(), int(a)))
            for row, a in zip(observations, actions, strict=True)
        ]
        known = np.array([p is not None for p in found])
        return np.array([p or 0.0 for p in found], dtype=np.float32), known
