"""Which candidate a cell names as the winner: by a letter, a name or a number."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_gym.errors import InputError

SETTINGS = ("winner_first", "winner_tie")
"""Words of a column map about its winners: the number of the first candidate, and a tie's value."""

TIES = ("tie", "tie (bothbad)", "bothbad", "both", "equal", "draw", "same", "neither")

_NAME = re.compile(
    r"(?:model|assistant|answer|response|output|completion|candidate|option)?[ _-]?"
    r"(?:(?P<letter>[a-z])|(?P<number>[0-9]{1,9})(?:\.0+)?)"
)

# The letter or number at the end of a column's name: answer_b, question.answer1, responseB.
_ENDING = re.compile(r"(?:^|[^A-Za-z])([A-Za-z])$|(?<=[a-z])([A-Z])$|([0-9]{1,9})$")


@dataclass(frozen=True)
class Winners:
    """How a column names the winner.

    Attributes:
        first: The number of the first candidate, 0 or 1; None if it is not known yet.
        tie: The value that means a tie, next to `TIES`; None if there is none.
        endings: The letters, or numbers, at the end of the candidates' columns, if winners are
            named by them; else winners are counted in the order of the columns.
    """

    first: int | None = None
    tie: str | None = None
    endings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, first: str | None, tie: str | None) -> "Winners":
        """From the words of a column map.

        Raises:
            InputError: The first number is neither 0 nor 1.
        """
        if first not in (None, "0", "1"):
            raise InputError(f"winner_first must be 0 or 1, not {first!r}")
        return cls(None if first is None else int(first), tie)

    def settled(
        self, source: str, found: Iterable[tuple[Any, int]], named: Sequence[str]
    ) -> "Winners":
        """These, with the endings of the columns, or with the number of the first candidate.

        Args:
            source: The file's name in messages.
            found: The winner and the number of candidates K of each row.
            named: The candidates' columns.

        Raises:
            InputError: The numbers fit counting from 0 and from 1, or neither.
        """
        found = [(short, k) for value, k in found if (short := self._short(value, named))]
        endings = _endings(named)
        numbered = all(map(str.isdigit, endings))
        # A file has one way to name winners: by their endings only if each of them is an ending.
        alike = {short for short, _ in found if short.isdigit() == numbered}
        if alike <= {*endings} and not (numbered and self.first is not None):
            self = replace(self, endings=endings)
            found = [(short, k) for short, k in found if short not in endings]
        numbers = {(int(short), k) for short, k in found if short.isdigit()}
        if self.first is not None or not numbers:
            return self
        fits = [f for f in (0, 1) if all(f <= n < k + f for n, k in numbers)]
        if len(fits) == 1:
            return replace(self, first=fits[0])
        shown = ", ".join(map(str, sorted({n for n, _ in numbers})[:5]))
        how = "from 0 as well as from 1" if fits else "neither from 0 nor from 1"
        raise InputError(
            f"{source}: the winners {shown} can be counted {how}; add winner_first=0 or "
            "winner_first=1 to --columns (and winner_tie=NUMBER if one number is a tie)"
        )

    def index(self, value: Any, k: int, named: Sequence[str]) -> int | None:
        """The winner's index among K candidates; None for a tie.

        Raises:
            InputError: The value names none of them.
        """
        if self._is_tie(value):
            return None
        short = self._short(value, named)
        if short is None:
            index = named.index(value) if len(named) > 1 and value in named else -1
        elif short in self.endings:
            index = self.endings.index(short)
        elif short.isdigit():
            index = int(short) - (self.first or 0)
        else:
            index = ord(short) - ord("a")
        if not 0 <= index < k:
            raise InputError(f"winner is {value!r}, which names none of {k} candidates")
        return index

    def _short(self, value: Any, named: Sequence[str]) -> str | None:
        """The letter or the number in a winner's name; None if the value is a column or a tie."""
        # True and False do not say which of two answers they are about.
        if isinstance(value, bool) or self._is_tie(value) or (len(named) > 1 and value in named):
            return None
        match = _NAME.fullmatch(_plain(value))
        if match is None:
            return None
        return match["letter"] or str(int(match["number"]))

    def _is_tie(self, value: Any) -> bool:
        return _plain(value) in (*TIES, *([] if self.tie is None else [_plain(self.tie)]))


def _endings(named: Sequence[str]) -> tuple[str, ...]:
    """The endings of columns if all are different letters, or all different numbers; else none."""
    found = [match.group().strip("_-. ") for name in named if (match := _ENDING.search(name))]
    endings = tuple(str(int(one)) if one.isdigit() else one[-1].lower() for one in found)
    is_one_kind = len({one.isdigit() for one in endings}) == 1
    whole = len(named) > 1 and len({*endings}) == len(named)
    return endings if whole and is_one_kind else ()


def _plain(value: Any) -> str:
    return str(value).strip().lower()
