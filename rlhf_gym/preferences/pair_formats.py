"""Public formats of chosen and rejected answers: each function turns one row into rows of ours.

A function may raise `InputError` for a row that its format does not allow.
`rlhf_gym.preferences.known_formats` says which keys identify each format.
"""

from collections.abc import Iterator
from typing import Any

from rlhf_gym.errors import InputError
from rlhf_gym.preferences.dialogues import (
    Row,
    answer_text,
    joined,
    messages_of,
    parted,
    user_message,
    with_context,
)

HH_TURN = "\n\nAssistant:"
NO_SHARED_TURN = f"chosen and rejected share no {HH_TURN!r} turn to split at"


def hh(row: Row) -> Iterator[Row]:
    """Anthropic HH: `chosen` and `rejected` are whole dialogues with the same beginning.

    The prompt is everything up to the last assistant turn that both share.
    """
    if problem := hh_misfit(row):
        raise InputError(problem)
    chosen, rejected = row["chosen"], row["rejected"]
    at = _last_shared_turn(chosen, rejected)
    yield {"prompt": chosen[:at], "candidates": [chosen[at:], rejected[at:]], "best": 0}


def hh_misfit(row: Row) -> str | None:
    """Why a row with chosen and rejected is not one of HH; None if it is."""
    sides = [row["chosen"], row["rejected"]]
    if not all(isinstance(side, str) for side in sides) or _last_shared_turn(*sides) < 0:
        return NO_SHARED_TURN
    return None


def _last_shared_turn(a: str, b: str) -> int:
    """End of the last assistant marker inside the common beginning of two dialogues, or −1."""
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    shared = a[: min(len(a), len(b)) if common is None else common]
    at = shared.rfind(HH_TURN)
    return at + len(HH_TURN) if at >= 0 else -1


def pair(row: Row) -> Iterator[Row]:
    """The hub's convention: `prompt`, `chosen`, `rejected`, each a text or chat messages.

    If chosen and rejected are whole dialogues, the messages that both share are the prompt.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(prompt, list):
        prompt = messages_of(prompt)
    if isinstance(chosen, list) and isinstance(rejected, list):
        sides = [messages_of(chosen), messages_of(rejected)]
        shared, answers = parted("chosen and rejected", sides)
        prompt = joined(prompt, shared) if isinstance(prompt, list) else shared or prompt
    else:
        answers = [answer_text(chosen), answer_text(rejected)]
    yield {"prompt": with_context(prompt, row), "candidates": answers, "best": 0}


def pair_misfit(row: Row) -> str | None:
    """Why a row with chosen and rejected is not a pair; None if it is.

    Whole dialogues of chat messages need no prompt.
    """
    if "prompt" in row or all(isinstance(row[side], list) for side in ("chosen", "rejected")):
        return None
    return "it lacks prompt"


def orca(row: Row) -> Iterator[Row]:
    """Orca-DPO: `system`, `question`, `chosen`, `rejected`."""
    yield _chosen(user_message(row["question"]), row)


def alpaca_dpo(row: Row) -> Iterator[Row]:
    """LLaMA-Factory's Alpaca rows: `instruction`, `input`, `system`, `history` and the answers."""
    yield _chosen(user_message(row["instruction"], row.get("input")), row)


def sharegpt(row: Row) -> Iterator[Row]:
    """ShareGPT: `conversations` of from and value, then one message `chosen` and one `rejected`."""
    yield _chosen(messages_of(row["conversations"]), row)


def _chosen(prompt: Any, row: Row) -> Row:
    answers = [answer_text(row["chosen"]), answer_text(row["rejected"])]
    return {"prompt": with_context(prompt, row), "candidates": answers, "best": 0}
