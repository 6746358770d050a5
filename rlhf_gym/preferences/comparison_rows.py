"""Rows of the project's comparison format: checked one by one, and turned into `Comparison`s.

Every problem is named with the row and the fix, because people write these files by hand.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_gym.data.prompts import HALF_A_CHARACTER, has_half_a_character, is_prompt
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.comparison import LABELS, Comparison

_COUNTS = ("votes", "ties")


def comparison_of(where: str, row: Any) -> Comparison:
    """Check one row of the project's format.

    Args:
        where: The row's name in messages.
        row: The decoded JSON.

    Raises:
        InputError: It is not a comparison; the message says what is wrong and where.
    """
    if isinstance(row, dict):  # rows of a dataset have all columns, null if absent
        row = whole_numbers({name: value for name, value in row.items() if value is not None})
    for problem in _problems(row):
        raise InputError(f"{where}: {problem}")
    label = next(name for name in LABELS if name in row)
    ids = row.get("ids")
    return Comparison(
        prompt=row["prompt"],
        candidates=tuple(row["candidates"]),
        ties=row.get("ties", 0),
        ids=ids and (tuple(ids["prompt"]), tuple(tuple(c) for c in ids["candidates"])),
        finish_reasons=tuple(row["finish_reasons"]) if row.get("finish_reasons") else None,
        **{label: _frozen(row[label])},
    )


def whole_numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose votes and ties are whole numbers, also where they are written as floats (2.0).

    A table turns a column of counts into floats if a row has none there.
    """
    return {name: value if name not in _COUNTS else _whole(value) for name, value in row.items()}


def _whole(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _problems(row: Any) -> Iterator[str]:
    """The problems of a row, the most basic one first."""
    if not isinstance(row, dict):
        yield f"an object is needed, not {str(row)[:60]!r}"
        return
    missing = {"prompt", "candidates"} - row.keys()
    labels = [name for name in LABELS if name in row]
    if missing or len(labels) != 1:
        yield (
            f"a comparison has prompt, candidates and one of {', '.join(LABELS)}; this one has "
            f"{', '.join(map(str, row)) or 'nothing'}"
        )
        return
    if not is_prompt(row["prompt"]):
        yield f"prompt must be a text or chat messages, not {str(row['prompt'])[:60]!r}"
    candidates = row["candidates"]
    if not isinstance(candidates, list | tuple) or len(candidates) < 2:
        yield "candidates must be a list of at least two texts"
        return
    yield from _candidate_problems(candidates, row.get("ids"))
    problem = label_problem(labels[0], row[labels[0]], len(candidates), row.get("ties", 0))
    if problem:
        yield problem
    if labels[0] != "votes" and row.get("ties", 0) != 0:
        yield "ties are allowed with votes only"
    reasons = row.get("finish_reasons", ["stop"] * len(candidates))
    if not isinstance(reasons, list | tuple) or len(reasons) != len(candidates):
        yield f"finish_reasons must be one for each candidate, not {reasons!r}"
    elif not all(reason in ("stop", "length") for reason in reasons):
        yield f"finish_reasons must be stop or length, not {reasons!r}"
    # A dataset's further columns may be anything.
    if has_half_a_character([row["prompt"], *candidates]):
        yield HALF_A_CHARACTER


def _candidate_problems(candidates: Sequence[Any], ids: Any) -> Iterator[str]:
    k = len(candidates)
    if ids is not None and not (
        isinstance(ids, dict)
        and _are_ids(ids.get("prompt"))
        and isinstance(ids.get("candidates"), list | tuple)
        and len(ids["candidates"]) == k
        and all(_are_ids(c) and c for c in ids["candidates"])
    ):
        yield "ids must have a prompt and one list of token ids for each candidate"
    for i, text in enumerate(candidates):
        if not isinstance(text, str):
            yield f"candidate {i} is not a text, but {json.dumps(text, default=str)[:60]}"
        # A sampled candidate may be empty (EOS at once) or be drawn twice: its ids say what it is.
        elif ids is None and not text.strip():
            yield f"candidate {i} is empty"
        elif ids is None and text in candidates[:i]:
            yield f"candidates {candidates.index(text)} and {i} are the same text"


def _are_ids(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(is_index(v, 1 << 31) for v in values)


def is_index(value: Any, k: int) -> bool:
    """Whether a value is a whole number from 0 to k − 1; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < k


def label_problem(name: str, label: Any, k: int, ties: Any) -> str | None:
    """What is wrong with the label of K candidates; None if nothing is.

    Args:
        name: One of `LABELS`.
        label: Its value.
        k: K.
        ties: The number of annotators who found the candidates equal.
    """
    if name == "best":
        return None if is_index(label, k) else f"best is {label!r}, but must be 0 to {k - 1}"
    if not isinstance(label, list | tuple):
        return f"{name} must be a list, not {label!r}"
    if name in ("ranking", "pairs"):
        return _index_problem(name, label, k)
    if len(label) != k or not all(map(is_finite, label)):
        return f"{name} must be {k} finite numbers, one for each candidate, not {label!r}"
    if name == "votes":
        if not all(is_index(v, 1 << 31) for v in [*label, ties]):
            return f"votes and ties must be counts, not {label!r} and {ties!r}"
        if sum(label) + ties == 0:
            return "nobody voted"
    return None


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number; True and False are not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    # Not math.isfinite: it raises on an integer that is too large for a float.
    return abs(value) <= sys.float_info.max


def _index_problem(name: str, label: Any, k: int) -> str | None:
    groups = [list(group) if isinstance(group, list | tuple) else [None] for group in label]
    listed = [i for group in groups for i in group]
    if not all(is_index(i, k) for i in listed) or not all(groups):
        return f"{name} must list groups of candidates 0 to {k - 1}, not {label!r}"
    if name == "ranking" and (len(set(listed)) < len(listed) or len(listed) < 2):
        return f"ranking must list at least two candidates, each once, not {label!r}"
    if name == "pairs" and not (groups and all(len(g) == 2 and g[0] != g[1] for g in groups)):
        return f"pairs must be [winner, loser] each, not {label!r}"
    return None
