"""Ratings of single answers, one per row: read from public formats, and grouped by their prompt."""

import json
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from rlhf_gym.errors import InputError
from rlhf_gym.preferences.cells import flag, number
from rlhf_gym.preferences.dialogues import Row, answer_text, user_message
from rlhf_gym.preferences.list_formats import ranking_of


class Rating(NamedTuple):
    """One rated answer.

    Attributes:
        prompt: Text or chat messages.
        text: The answer.
        value: Its score, or True (desirable) or False.
        key: Rows with equal keys belong to one comparison.
        is_rank: Whether `value` is a place, of which the lowest is best.
    """

    prompt: Any
    text: Any
    value: float | bool
    key: str
    is_rank: bool = False


def rating(
    prompt: Any, text: Any, value: float | bool, key: Any = None, *, is_rank: bool = False
) -> Rating:
    """A rating; its key is the prompt's unless another value is given."""
    key = json.dumps(prompt if key is None else key, sort_keys=True, default=str)
    return Rating(prompt, answer_text(text), value, key, is_rank)


def helpsteer(row: Row) -> Iterator[Rating]:
    """HelpSteer and HelpSteer2: `prompt`, `response` and its `helpfulness`, one answer per row."""
    value = number("helpfulness", row["helpfulness"])
    yield rating(user_message(row["prompt"]), row["response"], value)


def kto(row: Row) -> Iterator[Rating]:
    """KTO: `prompt`, `completion` and a `label`, True for a desirable completion."""
    yield rating(row["prompt"], row["completion"], flag("label", row["label"]))


def grouped(ratings: Sequence[Rating]) -> Row:
    """One comparison of the rated answers to a prompt.

    The ratings of one text are averaged: several people may have rated it. True and False say
    nothing about two answers with the same label, so they become pairs and not a ranking.

    Raises:
        InputError: There is only one answer, or all have the same label.
    """
    values: dict[str, list[float]] = {}
    texts: dict[str, Any] = {}
    for one in ratings:
        name = json.dumps(one.text, default=str)
        texts[name] = one.text
        values.setdefault(name, []).append(one.value)
    if len(texts) < 2:
        raise InputError("its prompt has only one rated answer; a comparison needs two")
    means = [fmean(given) for given in values.values()]
    row: Row = {"prompt": ratings[0].prompt, "candidates": list(texts.values())}
    if any(isinstance(one.value, bool) for one in ratings):
        # A text with both labels is neither, and is in no pair.
        won, lost = ([i for i, mean in enumerate(means) if mean == side] for side in (1, 0))
        if not won or not lost:
            raise InputError(
                "the answers of its prompt have only one label; a comparison needs a desirable "
                "and an undesirable one"
            )
        return {**row, "pairs": [[winner, loser] for winner in won for loser in lost]}
    if ratings[0].is_rank:
        return {**row, "ranking": ranking_of(means)}
    return {**row, "scores": means}
