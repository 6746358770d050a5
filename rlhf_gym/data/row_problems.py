"""Problems of rows, gathered while a file is read: one error for all, or counts by reason.

A problem is one line, "FILE, line 3: what is wrong".
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_gym.errors import InputError

SKIP_HINT = "--on-bad-row skip (in Python: skipped=[]) leaves such rows out"
MOST_SHOWN = 5

# The row's name: "FILE, line 3", "NAME, row 3, group 2", "FILE, row 3 and 2 more rows".
_ROW = re.compile(r"^.*?, (?:line|row) \d+(?:, group \d+)?(?: and \d+ more rows?)?:? ", re.DOTALL)
# What differs between two rows with the same problem: numbers, and values that are quoted.
_VALUE = re.compile(r"""'[^']*'|"[^"]*"|\[[^\]]*\]|-?\b\d+(?:\.\d+)?\b""")


@dataclass
class RowReport:
    """What a reader left out, changed and did not use.

    Attributes:
        skipped: A problem for each row that was left out.
        repaired: A problem for each part of a row that was left out or merged, so that the rest of
            the row could be kept.
        unused: Columns that were not used.
        format: The format of the rows; None if they have several, or were read with a map.
    """

    skipped: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    format: str | None = None

    def figures(self) -> dict[str, Any]:
        """The format and the counts by reason, for the files of a run."""
        return {
            "format": self.format,
            "left_out": by_reason(self.skipped),
            "repaired": by_reason(self.repaired),
        }

    def lines(self) -> list[str]:
        """The counts by reason, for the terminal: one line for each kind that occurred."""
        found = (
            summary(self.skipped, "row left out", "rows left out"),
            summary(self.repaired, "candidate repaired", "candidates repaired"),
        )
        return [line for line in found if line]


def by_reason(problems: Iterable[str]) -> dict[str, int]:
    """Count problems by what is wrong, without the rows' names and values; most frequent first."""
    return dict(Counter(map(_reason, problems)).most_common())


def summary(problems: Sequence[str], one: str, many: str) -> str:
    """Format counts by reason, as "12 rows left out: 8 × candidate … is empty, 4 × nobody voted".

    Args:
        problems: The problems; an empty text is returned if there are none.
        one: What a single problem is called.
        many: What several are called.
    """
    if not problems:
        return ""
    counts = ", ".join(f"{n} × {reason}" for reason, n in by_reason(problems).items())
    return f"{len(problems)} {one if len(problems) == 1 else many}: {counts}"


def refusal(problems: Sequence[str], hint: str | None = SKIP_HINT) -> InputError:
    """The error for a source with bad rows: its first problems and the number of all.

    Args:
        problems: At least one problem.
        hint: How to read the source without these rows; None if no row would be left.
    """
    if len(problems) == 1:
        return InputError(f"{problems[0]}; {hint}" if hint else problems[0])
    lines = [f"  {line}" for line in _without_repeats(problems[:MOST_SHOWN])]
    shown = "\n".join([*lines, hint] if hint else lines)
    first = f", the first {MOST_SHOWN} are" if len(problems) > MOST_SHOWN else ""
    return InputError(f"{len(problems)} rows cannot be used{first}:\n{shown}")


def _without_repeats(problems: Sequence[str]) -> Iterator[str]:
    """Problems that say the same as the one before in two words."""
    before = ""
    for problem in problems:
        row = _ROW.match(problem)
        text = problem if row is None else problem[row.end() :]
        yield f"{problem[: -len(text)]}the same" if row and text == before else problem
        before = text


def _reason(problem: str) -> str:
    return _VALUE.sub("…", _ROW.sub("", problem, count=1))
