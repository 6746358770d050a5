"""Rows that cannot be used: collected, counted by reason, and refused or left out together."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from rlhf_gym.errors import InputError

OnBadRow = Literal["error", "skip"]
"""What to do with rows that cannot be used: stop, or leave them out and count them."""

SHOWN = 5
"""Problems that one message shows."""


class RowError(InputError):
    """A row that cannot be used.

    Args:
        message: The problem; it names the row.
        reason: The kind of problem, in words that are the same for each such row.
    """

    def __init__(self, message: str, reason: str = "cannot be read") -> None:
        super().__init__(message)
        self.reason = reason


class BadRows:
    """The rows of one source that cannot be used."""

    def __init__(self) -> None:
        self.problems: list[RowError] = []

    def __len__(self) -> int:
        return len(self.problems)

    def add(self, problem: RowError) -> None:
        """Add a row."""
        self.problems.append(problem)

    def add_unread(self, problems: Iterable[str]) -> None:
        """Add what the reader of the file left out (`skipped` of `load_rows`)."""
        self.problems += map(RowError, problems)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by reason, the most frequent first."""
        return dict(Counter(problem.reason for problem in self.problems).most_common())

    def refuse(self, source: str, usable: int, skip: str) -> None:
        """Raise an error that shows the first problems, if there are any.

        Args:
            source: The file or dataset.
            usable: Number of its other rows.
            skip: The option that leaves such rows out.

        Raises:
            InputError: There is a problem.
        """
        if not self.problems:
            return
        first = self.problems[:SHOWN]
        if len(self) == 1:
            lines, ask = str(first[0]), "; to leave such rows out: "
        else:
            which = f"the first {SHOWN} of them" if len(self) > SHOWN else "they are"
            shown = "".join(f"\n  {problem}" for problem in first)
            lines, ask = f"{self.line(source, usable)}; {which}:{shown}", "\nto leave them out: "
        raise InputError(f"{lines}{ask}{skip}" if usable else lines) from first[0]

    def line(self, source: str, usable: int) -> str:
        """One line with the number of rows by reason."""
        reasons = ", ".join(f"{reason}: {n}" for reason, n in self.counts.items())
        return f"{source}: {len(self)} of {len(self) + usable} rows cannot be used ({reasons})"
