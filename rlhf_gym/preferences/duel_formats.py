"""Public formats of two answers and a verdict: each function turns one row into rows of ours.

A function may raise `InputError` for a row that its format does not allow.
`rlhf_gym.preferences.known_formats` says which keys identify each format.
"""

from collections.abc import Iterator
from typing import Any

from rlhf_gym.errors import InputError
from rlhf_gym.preferences.cells import flag, listed, number
from rlhf_gym.preferences.dialogues import Row, messages_of, parted, user_message

TLDR = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
ARTICLE = "Article:\n\n{article}\n\nTL;DR:"


def verdict(winner: int | None) -> Row:
    """The label of one judgement: the winner's index, or None for a tie."""
    # A tie is one annotator who found the answers equal; its loss is lowest at equal logits.
    return {"votes": [0, 0], "ties": 1} if winner is None else {"best": winner}


def strength(name: str, value: Any, most: float) -> Row:
    """The label of a signed preference: negative for the first answer, 0 for a tie."""
    n = number(name, value)
    if not abs(n) <= most:
        raise InputError(f"{name} must be between -{most} and {most}, not {value!r}")
    # As scores, so that --soft-temperature can use how much better an answer is.
    return {"scores": [max(-n, 0), max(n, 0)]}


def pandalm(row: Row) -> Iterator[Row]:
    """PandaLM: `instruction`, `input`, two responses; annotators say 1, 2, or 0 for a tie."""
    verdicts = [value for name, value in row.items() if name.startswith("annotator")]
    if not verdicts or not {repr(verdict) for verdict in verdicts} <= {"0", "1", "2"}:
        raise InputError(f"annotators must say 0, 1 or 2, not {verdicts!r}")
    yield {
        "prompt": user_message(row["instruction"], row.get("input")),
        "candidates": [row["response1"], row["response2"]],
        "votes": [verdicts.count(1), verdicts.count(2)],
        "ties": verdicts.count(0),
    }


def llmbar(row: Row) -> Iterator[Row]:
    """LLMBar: `input`, two outputs and a `label` 1 or 2."""
    if row["label"] not in (1, 2):
        raise InputError(f"label must be 1 or 2, not {row['label']!r}")
    yield {
        "prompt": user_message(row["input"]),
        "candidates": [row["output_1"], row["output_2"]],
        "best": row["label"] - 1,
    }


def alpaca(row: Row) -> Iterator[Row]:
    """AlpacaFarm: `instruction`, `input`, two outputs; `preference` 1 or 2, 1.5 or 0 for a tie."""
    winners: dict[float, int | None] = {1: 0, 2: 1, 1.5: None, 0: None}
    said = number("preference", row["preference"])
    if said not in winners:
        raise InputError(f"preference must be 1 or 2 (1.5 or 0 for a tie), not {said!r}")
    yield {
        "prompt": user_message(row["instruction"], row.get("input")),
        "candidates": [row["output_1"], row["output_2"]],
        **verdict(winners[said]),
    }


def arena(row: Row) -> Iterator[Row]:
    """Chatbot Arena 33k and MT-Bench: `conversation_a`, `conversation_b` and the `winner`.

    Only the first `turn` turns of the conversations were judged.
    """
    winners = {"model_a": 0, "model_b": 1, "tie": None, "tie (bothbad)": None}
    if row["winner"] not in winners:
        raise InputError(f"winner must be {', '.join(winners)}, not {row['winner']!r}")
    sides = [messages_of(row[name]) for name in ("conversation_a", "conversation_b")]
    if row.get("turn") is not None:
        last = 2 * int(number("turn", row["turn"]))
        sides = [side[: last + (side[:1] != [] and side[0]["role"] == "system")] for side in sides]
    prompt, answers = parted("the conversations", sides)
    yield {"prompt": prompt, "candidates": answers, **verdict(winners[row["winner"]])}


def arena_lists(row: Row) -> Iterator[Row]:
    """Chatbot Arena 55k: `prompt`, `response_a`, `response_b` are lists of turns, as JSON text."""
    questions = listed("prompt", row["prompt"])
    sides = []
    for name in ("response_a", "response_b"):
        replies = listed(name, row[name])
        if len(replies) != len(questions):
            raise InputError(f"{name} has {len(replies)} turns, but prompt has {len(questions)}")
        turns = zip(questions, replies, strict=True)
        sides.append(
            [
                {"role": role, "content": text}
                for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
        )
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    said = [
        i for i, name in enumerate(names) if row.get(name) is not None and flag(name, row[name])
    ]
    if len(said) != 1:
        raise InputError(f"exactly one of {', '.join(names)} must be 1, not {len(said)}")
    prompt, answers = parted("the conversations", sides)
    yield {
        "prompt": prompt,
        "candidates": answers,
        **verdict(None if said == [2] else said[0]),
    }


def shp(row: Row) -> Iterator[Row]:
    """Stanford Human Preferences: `history`, two human answers, `labels` 1 if A is better."""
    yield {
        "prompt": user_message(row["history"]),
        "candidates": [row["human_ref_A"], row["human_ref_B"]],
        "best": 0 if flag("labels", row["labels"]) else 1,
    }


def helpsteer2_preference(row: Row) -> Iterator[Row]:
    """HelpSteer2-Preference: two responses and `preference_strength` from −3 (the first) to 3."""
    yield {
        "prompt": user_message(row["prompt"]),
        "candidates": [row["response_1"], row["response_2"]],
        **strength("preference_strength", row["preference_strength"], 3),
    }


def helpsteer3(row: Row) -> Iterator[Row]:
    """HelpSteer3: messages `context`, two responses, `overall_preference` from −3 (first) to 3."""
    yield {
        "prompt": messages_of(row["context"]),
        "candidates": [row["response1"], row["response2"]],
        **strength("overall_preference", row["overall_preference"], 3),
    }


def webgpt(row: Row) -> Iterator[Row]:
    """WebGPT: `question`, two answers and their scores, 0 and 0 for a tie."""
    question = row["question"]
    text = question["full_text"] if isinstance(question, dict) else question
    # The quotes are what each answer's author found, so they are no part of a common prompt.
    yield {
        "prompt": user_message(text),
        "candidates": [row["answer_0"], row["answer_1"]],
        "scores": [number(name, row[name]) for name in ("score_0", "score_1")],
    }


def summaries(row: Row) -> Iterator[Row]:
    """Stiennon et al. 2020: a post or article (`info`), two `summaries` and the `choice`."""
    info = row["info"]
    form = TLDR if info.get("post") else ARTICLE
    fields = ("subreddit", "title", "post") if info.get("post") else ("article",)
    for name in fields:
        if not isinstance(info[name], str):
            raise InputError(f"{name} of info must be a text, not {info[name]!r}")
    yield {
        "prompt": form.format(**{name: info[name] for name in fields}),
        "candidates": [summary["text"] for summary in row["summaries"]],
        "best": row["choice"],
    }
