"""The public formats by name, and which one a row has.

A format is a function from one row of the public file to rows of ours, or to ratings of single
answers, and is recognised by its keys. To add one, write such a function (see
`rlhf_gym.preferences.duel_formats`) and list it in `FORMATS`.
"""

from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from rlhf_gym.errors import InputError
from rlhf_gym.preferences.dialogues import CONTEXT, Row
from rlhf_gym.preferences.duel_formats import (
    alpaca,
    arena,
    arena_lists,
    helpsteer2_preference,
    helpsteer3,
    llmbar,
    pandalm,
    shp,
    summaries,
    webgpt,
)
from rlhf_gym.preferences.list_formats import (
    distilabel,
    e2e,
    native,
    nectar,
    nectar_misfit,
    oasst,
    qa_feedback,
    scored,
    ziegler,
)
from rlhf_gym.preferences.pair_formats import (
    alpaca_dpo,
    hh,
    hh_misfit,
    orca,
    pair,
    pair_misfit,
    sharegpt,
)
from rlhf_gym.preferences.rating_formats import Rating, helpsteer, kto

Reader = Callable[[Row], Iterator[Row | Rating]]

COLUMNS_HINT = (
    "name the columns with --columns, as in --columns prompt=question chosen=answer_a "
    "rejected=answer_b"
)


def _fits(row: Row) -> str | None:
    return None


class Format(NamedTuple):
    """A public format.

    Attributes:
        keys: The columns that identify a row of it; "a|b" is either of two.
        read: Turns a row into rows of ours or into ratings.
        further: Other columns that it reads; a name may end in "*".
        misfit: Why a row that has the keys is not of this format; None if it is.
    """

    keys: set[str]
    read: Reader
    further: Collection[str] = ()
    misfit: Callable[[Row], str | None] = _fits

    def lacks(self, row: Row) -> list[str]:
        """The keys that a row does not have."""
        return sorted(key for key in self.keys if not {*key.split("|")} & row.keys())

    def reads(self, column: str) -> bool:
        """Whether the format uses a column."""
        either = (name for key in self.keys for name in key.split("|"))
        return column in either or any(fnmatchcase(column, name) for name in self.further)


FORMATS: dict[str, Format] = {
    "native": Format(
        {"prompt", "candidates"},
        native,
        ("best", "ranking", "scores", "votes", "pairs", "ties", "ids", "finish_reasons"),
    ),
    "pair": Format({"chosen", "rejected"}, pair, ("prompt", *CONTEXT), pair_misfit),
    "hh": Format({"chosen", "rejected"}, hh, (), hh_misfit),
    "orca": Format({"question", "chosen", "rejected"}, orca, CONTEXT),
    "alpaca_dpo": Format({"instruction", "chosen", "rejected"}, alpaca_dpo, ("input", *CONTEXT)),
    "sharegpt": Format({"conversations", "chosen", "rejected"}, sharegpt, CONTEXT),
    "oasst": Format({"message_tree_id", "prompt"}, oasst),
    "qa_feedback": Format(
        {"question", "prediction 1", "preference"}, qa_feedback, ("prediction *", "passages")
    ),
    "pandalm": Format({"instruction", "response1", "response2"}, pandalm, ("input", "annotator*")),
    "ziegler": Format({"query", "sample0", "best"}, ziegler, ("sample*",)),
    "scored": Format({"instruction", "completions"}, scored),
    "llmbar": Format({"input", "output_1", "output_2", "label"}, llmbar),
    "alpaca": Format({"instruction", "output_1", "output_2", "preference"}, alpaca, ("input",)),
    "arena": Format({"conversation_a", "conversation_b", "winner"}, arena, ("turn",)),
    "arena_lists": Format(
        {"prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"},
        arena_lists,
        ("winner_tie",),
    ),
    "shp": Format({"history", "human_ref_A", "human_ref_B", "labels"}, shp),
    "helpsteer": Format({"prompt", "response", "helpfulness"}, helpsteer),
    "helpsteer2_preference": Format(
        {"prompt", "response_1", "response_2", "preference_strength"}, helpsteer2_preference
    ),
    "helpsteer3": Format({"context", "response1", "response2", "overall_preference"}, helpsteer3),
    "webgpt": Format({"question", "answer_0", "answer_1", "score_0", "score_1"}, webgpt),
    "summaries": Format({"info", "summaries", "choice"}, summaries),
    "nectar": Format({"prompt", "answers"}, nectar, (), nectar_misfit),
    "distilabel": Format(
        {"instruction|input", "generations", "ratings|rating"}, distilabel, CONTEXT
    ),
    "kto": Format({"prompt", "completion", "label"}, kto),
    "e2e": Format({"mr", "ref1", "quality1"}, e2e, ("ref*", "quality*")),
}


def recognise(row: Row) -> str:
    """The name of the format of a row.

    Of two formats that fit, the one that reads more of the row's columns is meant.

    Raises:
        InputError: The row fits none, and the message has the two nearest; or it fits several.
    """
    found = [name for name, known in FORMATS.items() if not _problem(known, row)]
    if len(found) > 1:
        read = {name: {*filter(FORMATS[name].reads, row)} for name in found}
        found = [name for name in found if not any(read[name] < other for other in read.values())]
    if len(found) > 1:
        raise InputError(f"the row fits the formats {', '.join(found)}; name one with --format")
    if not found:
        raise InputError(
            f"the row has no known format: it has {', '.join(map(str, row)) or 'nothing'}; "
            f"{_nearest(row)}{COLUMNS_HINT}"
        )
    return found[0]


def _problem(known: Format, row: Row) -> str | None:
    if lacking := known.lacks(row):
        return "it lacks " + ", ".join(key.replace("|", " or ") for key in lacking)
    return known.misfit(row)


def _nearest(row: Row) -> str:
    """The two formats that lack least of a row, with what they lack."""
    near = [
        (len(lacking), -len(known.keys), f"{name} ({_problem(known, row)})")
        for name, known in FORMATS.items()
        if len(lacking := known.lacks(row)) < len(known.keys)
    ]
    if not near:
        return ""
    return f"the nearest are {' and '.join(text for *_, text in sorted(near)[:2])}; "
