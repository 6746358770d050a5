"""Groups of rows that play the same prompts in the same order, each row at its own pace."""

from collections.abc import Callable
from typing import Any

Ids = tuple[int, ...]


class PromptGroup:
    """The prompts of one group of rows: a prompt that one row draws, the others get later."""

    def __init__(self) -> None:
        self._queue: list[Ids] = []
        self._taken: dict[int, int] = {}  # by row of the group, counted from the queue's head

    def next(self, row: int, rows: int, draw: Callable[[], Ids]) -> Ids:
        """The next prompt of one row.

        Args:
            row: Index of the row in its group.
            rows: Number of rows in the group.
            draw: Draws a prompt that no row of the group has had yet.
        """
        at = self._taken.get(row, 0)
        if at == len(self._queue):
            self._queue.append(draw())
        prompt = self._queue[at]
        self._taken[row] = at + 1
        done = min(self._taken.get(i, 0) for i in range(rows))
        self._queue = self._queue[done:]
        self._taken = {i: n - done for i, n in self._taken.items()}
        return prompt

    def get_state(self) -> dict[str, Any]:
        """The state as JSON."""
        return {"queue": self._queue, "taken": sorted(self._taken.items())}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "PromptGroup":
        """Continue from `get_state`."""
        group = cls()
        group._queue = [tuple(ids) for ids in state["queue"]]
        group._taken = {int(row): int(n) for row, n in state["taken"]}
        return group
