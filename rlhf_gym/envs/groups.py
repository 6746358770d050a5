"""Rows that play the same prompts in the same order, whenever each of them gets there."""

from collections.abc import Callable
from typing import Any

Ids = tuple[int, ...]


class PromptGroup:
    """The prompts of one group of rows: what a row has drawn, the others will draw too."""

    def __init__(self) -> None:
        self._queue: list[Ids] = []
        self._taken: dict[int, int] = {}  # by row of the group, counted from the queue's head

    def next(self, row: int, rows: int, draw: Callable[[], Ids]) -> Ids:
        """The next prompt of one row.

        Args:
            row: Which of the group's rows.
            rows: How many there are.
            draw: Draws a prompt that no row has seen yet.
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
        """As JSON."""
        return {"queue": self._queue, "taken": sorted(self._taken.items())}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "PromptGroup":
        """Go on from `get_state`."""
        group = cls()
        group._queue = [tuple(ids) for ids in state["queue"]]
        group._taken = {int(row): int(n) for row, n in state["taken"]}
        return group
