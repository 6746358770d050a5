"""Public formats of K answers to one prompt: each function turns one row into rows of ours.

A function may yield several rows (a tree of answers) and raises `InputError` for a row that its
format does not allow. `rlhf_gym.preferences.known_formats` says which keys identify each format.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from rlhf_gym.errors import InputError
from rlhf_gym.preferences.cells import listed, number
from rlhf_gym.preferences.dialogues import Row, answer_text, user_message, with_context


def native(row: Row) -> Iterator[Row]:
    """The project's own: `prompt`, `candidates` and one label."""
    yield row


def ranking_of(ranks: Sequence[float]) -> list[list[int]]:
    """Groups of candidates, best first, from ranks of which the lowest is best."""
    levels = sorted(set(ranks))
    return [[i for i, rank in enumerate(ranks) if rank == level] for level in levels]


def oasst(row: Row) -> Iterator[Row]:
    """OpenAssistant trees: each group of ranked answers to a message, after its whole thread."""
    yield from _ranked_siblings(row["prompt"], [])


def _ranked_siblings(node: Row, thread: list[dict[str, str]]) -> Iterator[Row]:
    roles = {"prompter": "user", "assistant": "assistant"}
    thread = [*thread, {"role": roles[node["role"]], "content": node["text"]}]
    ranked = [reply for reply in node.get("replies", ()) if reply.get("rank") is not None]
    # People also ranked prompters' messages, but a policy only writes the assistant's.
    if len(ranked) > 1 and ranked[0]["role"] == "assistant":
        yield {
            "prompt": thread,
            "candidates": [reply["text"] for reply in ranked],
            "ranking": ranking_of([reply["rank"] for reply in ranked]),
        }
    for reply in node.get("replies", ()):
        yield from _ranked_siblings(reply, thread)


def qa_feedback(row: Row) -> Iterator[Row]:
    """FineGrainedRLHF QA feedback: K answers and a code for each pair, in the pairs' order.

    1: the first is better, 2: the second is, 0: equal. Consistent codes become a ranking (with
    ties); the others stay pairs.
    """
    names = numbered(row, "prediction ")
    codes = row["preference"]
    duels = list(combinations(range(len(names)), 2))
    if len(codes) != len(duels) or not set(codes) <= {0, 1, 2}:
        raise InputError(f"preference must be {len(duels)} codes 0, 1 or 2, not {codes!r}")
    texts = [f"{title}\n" + "\n".join(lines) for title, *lines in row.get("passages", ())]
    out: Row = {
        "prompt": user_message(*texts, row["question"]),
        "candidates": [row[name] for name in names],
    }
    won = [(a, b) if code == 1 else (b, a) for (a, b), code in zip(duels, codes, strict=True)]
    strict = [duel for duel, code in zip(won, codes, strict=True) if code]
    points = [sum((i == w) - (i == x) for w, x in strict) for i in range(len(names))]
    # The codes are a ranking with ties exactly if the points (wins − losses) order every pair as
    # the codes do.
    consistent = all(
        (points[a] > points[b]) - (points[a] < points[b]) == {0: 0, 1: 1, 2: -1}[code]
        for (a, b), code in zip(duels, codes, strict=True)
    )
    ranking = ranking_of([-p for p in points])
    yield out | ({"ranking": ranking} if consistent else {"pairs": strict})


def ziegler(row: Row) -> Iterator[Row]:
    """Ziegler et al. 2019: `query`, `sample0` … and `best`, as texts or as token ids.

    Ids (GPT-2's in the published files) are kept; decoding them needs the tokenizer.
    """
    yield {
        "prompt": row["query"],
        "candidates": [row[name] for name in numbered(row, "sample")],
        "best": row["best"],
    }


def scored(row: Row) -> Iterator[Row]:
    """UltraFeedback: `instruction` and `completions`, each a `response` with a score."""
    completions = row["completions"]
    yield {
        "prompt": user_message(row["instruction"]),
        "candidates": [completion["response"] for completion in completions],
        "scores": [completion["overall_score"] for completion in completions],
    }


def nectar(row: Row) -> Iterator[Row]:
    """Nectar: a `prompt` of Human and Assistant turns, and seven `answers` with their ranks."""
    answers = row["answers"]
    yield {
        "prompt": row["prompt"],
        "candidates": [answer["answer"] for answer in answers],
        "ranking": ranking_of([number("rank", answer["rank"]) for answer in answers]),
    }


def nectar_misfit(row: Row) -> str | None:
    """Why a row with prompt and answers is not one of Nectar; None if it is."""
    answers = row["answers"]
    if isinstance(answers, list) and all(
        isinstance(one, dict) and {"answer", "rank"} <= one.keys() for one in answers
    ):
        return None
    return "answers must each have answer and rank"


def distilabel(row: Row) -> Iterator[Row]:
    """distilabel: an `instruction` (or `input`), `generations` and a list of `ratings`."""
    name = "rating" if row.get("ratings") is None else "ratings"
    content = row["input"] if row.get("instruction") is None else row["instruction"]
    ratings = listed(name, row[name])
    yield {
        "prompt": with_context(user_message(content), row),
        "candidates": [answer_text(text) for text in listed("generations", row["generations"])],
        "scores": [score(name, value) for value in ratings],
    }


def score(name: str, value: Any) -> float | None:
    """The number in a cell; None, a candidate without a score, if its judge gave none."""
    if value is None or str(value).strip().lower() in ("", "none", "nan"):
        return None
    return number(name, value)


def e2e(row: Row) -> Iterator[Row]:
    """E2E NLG Challenge: a meaning `mr`, the texts `ref1` … with the ratings `quality1` … each."""
    texts, ratings = numbered(row, "ref"), numbered(row, "quality")
    if len(texts) != len(ratings):
        raise InputError(f"there are {len(texts)} texts ref… and {len(ratings)} ratings quality…")
    yield {
        "prompt": row["mr"],
        "candidates": [row[name] for name in texts],
        "scores": [score(name, row[name]) for name in ratings],
    }


def numbered(row: Row, prefix: str) -> list[str]:
    """The keys made of the prefix and a number, in the order of the numbers."""
    numbers = [key[len(prefix) :] for key in row if key.startswith(prefix)]
    return [prefix + n for n in sorted(filter(str.isdecimal, numbers), key=int)]
