"""Comparisons from any table: a map says which column is what.

A map has the roles `prompt`, `chosen` and `rejected`; or `candidates` with one of `scores`,
`votes`, `rank` (1 is best) and `winner`; or, for files with one rated answer per row, `group_by`
and `text` with `score` or `rank`. `system` and `history` go in front of the prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_gym.errors import InputError
from rlhf_gym.preferences.cells import flag, listed, number
from rlhf_gym.preferences.dialogues import (
    CONTEXT,
    Row,
    answer_text,
    joined,
    messages_of,
    parted,
    with_context,
)
from rlhf_gym.preferences.list_formats import ranking_of, score
from rlhf_gym.preferences.pair_formats import hh, pair
from rlhf_gym.preferences.rating_formats import Rating, rating
from rlhf_gym.preferences.winners import SETTINGS, Winners
from rlhf_gym.utils.nearest import did_you_mean

LABELS = ("scores", "votes", "rank", "winner")
SEVERAL = ("prompt", "candidates", "scores", "votes", "rank", "group_by")
"""Roles that may be several columns."""
ROLES = (
    *("prompt", "chosen", "rejected", "candidates", *LABELS, *SETTINGS),
    *("group_by", "text", "score", *CONTEXT),
)
FORMS = (
    "chosen and rejected; or candidates and one of scores, votes, rank and winner; or group_by, "
    "text and one of score and rank"
)


@dataclass(frozen=True)
class ColumnMap:
    """Which column of a file is what.

    Attributes:
        columns: The columns of each role. A name may lead into an object, "question.full_text",
            or into each object of a list, "answers.text".
        winners: How the column `winner` names a candidate.
    """

    columns: Mapping[str, tuple[str, ...]]
    winners: Winners

    @classmethod
    def parse(cls, given: Sequence[str] | Mapping[str, Any]) -> "ColumnMap":
        """A map from words, "prompt=question" or "candidates=[a,b]", or from a mapping.

        Raises:
            InputError: A role is unknown, given twice or missing, or has no columns.
        """
        pairs = list(given.items()) if isinstance(given, Mapping) else list(map(_word, given))
        columns: dict[str, tuple[str, ...]] = {}
        for role, names in pairs:
            if role not in ROLES:
                raise InputError(
                    f"--columns: there is no {role!r}{did_you_mean(str(role), ROLES)}; it takes "
                    f"{', '.join(ROLES)}"
                )
            if role in SETTINGS:  # numbers, if the map comes from JSON
                names = str(names)
            several = tuple(names) if isinstance(names, list | tuple) else (names,)
            if role in columns or not several or not all(isinstance(n, str) and n for n in several):
                raise InputError(f"--columns: {role} needs one column or a list, once: {names!r}")
            if len(several) > 1 and role not in SEVERAL:
                raise InputError(f"--columns: {role} is one column, not {', '.join(several)}")
            columns[role] = several
        _check_roles({*columns})
        first, tie = (columns.pop(name, (None,))[0] for name in SETTINGS)
        return cls(columns, Winners.parse(first, tie))

    def as_dict(self) -> dict[str, Any]:
        """The map as JSON has it, for the keyword `prompt_columns` of an environment."""
        named = {r: names[0] if len(names) == 1 else [*names] for r, names in self.columns.items()}
        settings = zip(SETTINGS, (self.winners.first, self.winners.tie), strict=True)
        return named | {name: str(value) for name, value in settings if value is not None}

    def settled(self, source: str, rows: Sequence[Row]) -> "ColumnMap":
        """The map with what only the whole file says: whether winners are counted from 0 or 1.

        Raises:
            InputError: No row has one of the columns, or the winners do not say how they count.
        """
        known = {name: None for row in rows for name in row}
        for name in (name for names in self.columns.values() for name in names):
            if name not in known and name.split(".")[0] not in known:
                raise InputError(
                    f"{source} has no column {name!r}{did_you_mean(name, map(str, known))}; it has "
                    f"{', '.join(map(str, known)) or 'none'}"
                )
        if "winner" not in self.columns:
            return self
        named = self.columns["candidates"]
        found = []
        for row in rows:
            try:
                k = len(self._values(row, "candidates"))
                found.append((self._value(row, "winner"), k))
            except InputError:  # reported when the row is read
                continue
        return replace(self, winners=self.winners.settled(source, found, named))

    def reads(self, column: str) -> bool:
        """Whether the map uses a column."""
        names = [name for names in self.columns.values() for name in names]
        return column in names or any(name.startswith(f"{column}.") for name in names)

    def read(self, row: Row) -> Iterator[Row | Rating]:
        """The comparison or the rating in a row.

        Raises:
            InputError: A column has no value, or one that does not fit.
        """
        context = {name: self._value(row, name) for name in CONTEXT if self._has(row, name)}
        if "group_by" in self.columns:
            yield self._rating(row, context)
        elif "chosen" in self.columns:
            yield from self._pair(row, context)
        else:
            yield self._list(row, context)

    def _pair(self, row: Row, context: Row) -> Iterator[Row]:
        sides = {name: self._value(row, name) for name in ("chosen", "rejected")}
        if "prompt" in self.columns:
            return pair({"prompt": self._prompt(row), **sides, **context})
        if all(isinstance(side, str) for side in sides.values()) and not context:
            return hh(sides)
        return pair({**sides, **context})

    def _list(self, row: Row, context: Row) -> Row:
        texts = [answer_text(value) for value in self._values(row, "candidates")]
        prompt = self._prompt(row) if "prompt" in self.columns else None
        if texts and all(isinstance(text, list) for text in texts):
            shared, texts = parted("the candidates", [messages_of(text) for text in texts])
            is_chat = isinstance(prompt, list)
            prompt = joined(messages_of(prompt), shared) if is_chat else shared or prompt
        label = next(name for name in LABELS if name in self.columns)
        out = {"prompt": with_context(prompt, context), "candidates": texts}
        if label == "winner":
            value = self._value(row, "winner")
            winner = self.winners.index(value, len(texts), self.columns["candidates"])
            if winner is None:
                return {**out, "votes": [0] * len(texts), "ties": 1}
            return {**out, "best": winner}
        values = [score(label, value) for value in self._values(row, label)]
        if len(values) != len(texts):
            raise InputError(f"there are {len(texts)} candidates, but {len(values)} {label}")
        if label == "rank":
            ranked = [i for i, value in enumerate(values) if value is not None]
            places = ranking_of([value for value in values if value is not None])
            return {**out, "ranking": [[ranked[i] for i in place] for place in places]}
        return {**out, label: values}

    def _rating(self, row: Row, context: Row) -> Rating:
        role = "score" if "score" in self.columns else "rank"
        value = self._value(row, role)
        if isinstance(value, bool) or str(value).strip().lower() in ("true", "false"):
            value = flag(role, value)
        else:
            value = number(role, value)
        key = [_found(row, name) for name in self.columns["group_by"]]
        prompt = self._prompt(row, "prompt" if "prompt" in self.columns else "group_by")
        prompt = with_context(prompt, context)
        # Rows with another system message or history answer another prompt.
        key = [key, context] if context else key
        return rating(prompt, self._value(row, "text"), value, key, is_rank=role == "rank")

    def _prompt(self, row: Row, role: str = "prompt") -> Any:
        parts = [_found(row, name) for name in self.columns[role]]
        if len(parts) == 1:
            return parts[0]
        if not all(isinstance(part, str | None) for part in parts):
            raise InputError(f"{role} has several columns, so each must be a text")
        return "\n\n".join(part for part in parts if part)

    def _has(self, row: Row, role: str) -> bool:
        return role in self.columns and _found(row, self.columns[role][0]) is not None

    def _value(self, row: Row, role: str) -> Any:
        """The value of a role that is one column."""
        name = self.columns[role][0]
        value = _found(row, name)
        if value is None:
            raise InputError(f"the column {name!r} has no value")
        return value

    def _values(self, row: Row, role: str) -> list[Any]:
        """The values of a role that is several columns, or one with a list."""
        names = self.columns[role]
        if len(names) > 1:
            return [_found(row, name) for name in names]
        return listed(f"the column {names[0]!r}", self._value(row, role))


def _word(word: str) -> tuple[str, str | list[str]]:
    """A role and its column or columns, from "role=column" or "role=[column,column]"."""
    role, equals, names = str(word).partition("=")
    if not equals:
        raise InputError(
            f"--columns takes ROLE=COLUMN words, such as prompt=question, not {word!r}"
        )
    if names.startswith("[") and names.endswith("]"):
        # Names with a comma are written as JSON: '["a, b","c"]'.
        return role, (
            listed(role, names)
            if names.startswith('["')
            else [name.strip() for name in names[1:-1].split(",")]
        )
    return role, names


def _check_roles(roles: set[str]) -> None:
    """Check that a map has one of the three forms, and nothing of another."""
    labels = [name for name in LABELS if name in roles]
    extra = roles - {"prompt", *CONTEXT}
    if "winner" in extra:
        extra -= {*SETTINGS}
    if extra == {"chosen", "rejected"}:
        return
    if len(labels) == 1 and (
        extra == {"candidates", labels[0]} or extra == {"group_by", "text", "rank"}
    ):
        return
    if extra == {"group_by", "text", "score"}:
        return
    raise InputError(
        f"--columns needs, next to prompt, {FORMS}; given are {', '.join(sorted(roles)) or 'none'}"
    )


def _found(row: Any, name: str) -> Any:
    """The value of a column, or inside it; None if there is none."""
    if isinstance(row, dict):
        if name in row:
            return row[name]
        first, dot, rest = name.partition(".")
        return _found(row[first], rest) if dot and first in row else None
    if isinstance(row, list):
        return [_found(one, name) for one in row]
    return None
