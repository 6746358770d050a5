"""Formats of public preference data: each function turns one row of a file into rows of ours.

A function may yield several rows (a tree of answers) and raises `InputError` for a row that its
format does not allow. `rlhf_gym.preferences.formats` says which keys identify each format, and
checks what comes out.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from rlhf_gym.errors import InputError

Row = dict[str, Any]

HH_TURN = "\n\nAssistant:"


def native(row: Row) -> Iterator[Row]:
    """The project's own: `prompt`, `candidates` and one label."""
    yield row


def hh(row: Row) -> Iterator[Row]:
    """Anthropic HH: `chosen` and `rejected` are whole dialogues with the same beginning.

    The prompt is everything up to the last assistant turn that both share.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    at = _last_shared_turn(chosen, rejected)
    if at < 0:
        raise InputError(f"chosen and rejected share no {HH_TURN!r} turn to split at")
    yield {"prompt": chosen[:at], "candidates": [chosen[at:], rejected[at:]], "best": 0}


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
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        sides = [chosen[shared:], rejected[shared:]]
        if any(len(side) != 1 or "content" not in side[0] for side in sides):
            raise InputError("chosen and rejected must differ in one last message")
        # If the dialogues do not repeat the prompt, the turns that they share come after it.
        if isinstance(prompt, list) and chosen[: len(prompt)] != prompt:
            prompt = [*prompt, *chosen[:shared]]
        else:
            prompt = chosen[:shared] or prompt
        chosen, rejected = (side[0]["content"] for side in sides)
    yield {"prompt": prompt, "candidates": [chosen, rejected], "best": 0}


def oasst(row: Row) -> Iterator[Row]:
    """OpenAssistant trees: each group of ranked answers to a message, after its whole thread."""
    yield from _ranked_siblings(row["prompt"], [])


def _ranked_siblings(node: Row, thread: list[dict[str, str]]) -> Iterator[Row]:
    roles = {"prompter": "user", "assistant": "assistant"}
    thread = [*thread, {"role": roles[node["role"]], "content": node["text"]}]
    ranked = [reply for reply in node.get("replies", ()) if reply.get("rank") is not None]
    levels = sorted({reply["rank"] for reply in ranked})
    # People also ranked prompters' messages, but a policy only writes the assistant's.
    if len(ranked) > 1 and ranked[0]["role"] == "assistant":
        yield {
            "prompt": thread,
            "candidates": [reply["text"] for reply in ranked],
            "ranking": [
                [i for i, reply in enumerate(ranked) if reply["rank"] == level] for level in levels
            ],
        }
    for reply in node.get("replies", ()):
        yield from _ranked_siblings(reply, thread)


def qa_feedback(row: Row) -> Iterator[Row]:
    """FineGrainedRLHF QA feedback: K answers and a code for each pair, in the pairs' order.

    1: the first is better, 2: the second is, 0: equal. Consistent codes become a ranking (with
    ties); the others stay pairs.
    """
    names = _numbered(row, "prediction ")
    codes = row["preference"]
    duels = list(combinations(range(len(names)), 2))
    if len(codes) != len(duels) or not set(codes) <= {0, 1, 2}:
        raise InputError(f"preference must be {len(duels)} codes 0, 1 or 2, not {codes!r}")
    texts = [f"{title}\n" + "\n".join(lines) for title, *lines in row.get("passages", ())]
    content = "\n\n".join([*texts, row["question"]])
    out: Row = {
        "prompt": [{"role": "user", "content": content}],
        "candidates": [row[name] for name in names],
    }
    won = [(a, b) if code == 1 else (b, a) for (a, b), code in zip(duels, codes, strict=True)]
    strict = [duel for duel, code in zip(won, codes, strict=True) if code]
    points = [sum((i == w) - (i == x) for w, x in strict) for i in range(len(names))]
    levels = sorted(set(points), reverse=True)
    ranking = [[i for i, p in enumerate(points) if p == level] for level in levels]
    # The codes are a ranking with ties exactly if the points (wins − losses) order every pair as
    # the codes do.
    consistent = all(
        (points[a] > points[b]) - (points[a] < points[b]) == {0: 0, 1: 1, 2: -1}[code]
        for (a, b), code in zip(duels, codes, strict=True)
    )
    yield out | ({"ranking": ranking} if consistent else {"pairs": strict})


def pandalm(row: Row) -> Iterator[Row]:
    """PandaLM: `instruction`, `input`, two responses; annotators say 1, 2, or 0 for a tie."""
    verdicts = [value for name, value in row.items() if name.startswith("annotator")]
    if not verdicts or not {repr(verdict) for verdict in verdicts} <= {"0", "1", "2"}:
        raise InputError(f"annotators must say 0, 1 or 2, not {verdicts!r}")
    content = "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
    yield {
        "prompt": [{"role": "user", "content": content}],
        "candidates": [row["response1"], row["response2"]],
        "votes": [verdicts.count(1), verdicts.count(2)],
        "ties": verdicts.count(0),
    }


def ziegler(row: Row) -> Iterator[Row]:
    """Ziegler et al. 2019: `query`, `sample0` … and `best`, as texts or as token ids.

    Ids (GPT-2's in the published files) are kept; decoding them needs the tokenizer.
    """
    names = _numbered(row, "sample")
    yield {
        "prompt": row["query"],
        "candidates": [row[name] for name in names],
        "best": row["best"],
    }


def scored(row: Row) -> Iterator[Row]:
    """UltraFeedback: `instruction` and `completions`, each a `response` with a score."""
    completions = row["completions"]
    yield {
        "prompt": [{"role": "user", "content": row["instruction"]}],
        "candidates": [completion["response"] for completion in completions],
        "scores": [completion["overall_score"] for completion in completions],
    }


def llmbar(row: Row) -> Iterator[Row]:
    """LLMBar: `input`, two outputs and a `label` 1 or 2."""
    if row["label"] not in (1, 2):
        raise InputError(f"label must be 1 or 2, not {row['label']!r}")
    yield {
        "prompt": [{"role": "user", "content": row["input"]}],
        "candidates": [row["output_1"], row["output_2"]],
        "best": row["label"] - 1,
    }


def _numbered(row: Row, prefix: str) -> list[str]:
    """The keys made of the prefix and a number, in the order of the numbers."""
    numbers = [key[len(prefix) :] for key in row if key.startswith(prefix)]
    return [prefix + n for n in sorted(filter(str.isdigit, numbers), key=int)]
