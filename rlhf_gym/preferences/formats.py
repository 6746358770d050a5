"""Public preference data, read into the project's comparisons.

Each format is a function from one row of the public file to rows of ours (see
`rlhf_gym.preferences.comparison.comparison_of`), and is recognised by its keys. To add a format,
write such a function and list it in `FORMATS`.
"""

import json
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.rows import load_rows
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.comparison import LABELS, Comparison, comparison_of

Row = dict[str, Any]

HH_TURN = "\n\nAssistant:"
# The published files are padded with this id. GPT-2 has no such token.
ZIEGLER_PAD = 50259


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


# Each format, the keys that identify a row of it, and its reader. The first match wins, so a format
# whose keys are a subset of another's comes after it.
FORMATS: dict[str, tuple[set[str], Callable[[Row], Iterator[Row]]]] = {
    "native": ({"prompt", "candidates"}, native),
    "pair": ({"prompt", "chosen", "rejected"}, pair),
    "hh": ({"chosen", "rejected"}, hh),
    "oasst": ({"message_tree_id", "prompt"}, oasst),
    "qa_feedback": ({"question", "prediction 1", "preference"}, qa_feedback),
    "pandalm": ({"instruction", "response1", "response2"}, pandalm),
    "ziegler": ({"query", "sample0", "best"}, ziegler),
    "scored": ({"instruction", "completions"}, scored),
    "llmbar": ({"input", "output_1", "output_2", "label"}, llmbar),
}


def read_comparisons(
    source: str | Path,
    *,
    format: str | None = None,
    skipped: list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str = "train",
    revision: str | None = None,
) -> list[Comparison]:
    """Read comparisons from a file, or from a dataset of the `datasets` library.

    Args:
        source: A path (see `rlhf_gym.data.rows.read_rows`), or a dataset's name.
        format: One of `FORMATS`; found from each row's keys if None.
        skipped: If given, bad rows are left out and the problem of each is appended here.
        tokenizer: Decodes the token ids of files without text.
        split: Split of a `datasets` dataset.
        revision: Commit or tag of a hub dataset.

    Raises:
        InputError: The source cannot be read, is empty, or a row is not a comparison; the message
            names the row.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    comparisons: list[Comparison] = []

    def refuse(error: InputError) -> None:
        if skipped is None:
            raise error
        skipped.append(str(error))

    for where, row in load_rows(str(source), split=split, revision=revision, skipped=skipped):
        try:
            found = _converted(where, row, format, tokenizer)
        except InputError as error:
            refuse(error)
            continue
        for i, one in enumerate(found, 1):
            try:
                place = where if len(found) == 1 else f"{where}, group {i}"
                comparisons.append(comparison_of(place, one))
            except InputError as error:
                refuse(error)
    if not comparisons:
        raise InputError(f"{source} has no comparisons")
    return comparisons


def _converted(
    where: str, row: Any, format: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[Row]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: an object is needed, not {str(row)[:60]!r}")
    name = format or _recognise(where, row)
    try:
        rows = list(FORMATS[name][1](row))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{where} is not of the format {name!r}: {type(error).__name__} {error}"
        ) from error
    return [_decoded(where, one, tokenizer) for one in rows] if name == "ziegler" else rows


def _recognise(where: str, row: Row) -> str:
    for name, (keys, _) in FORMATS.items():
        if keys <= row.keys() and not (name == "hh" and isinstance(row["chosen"], list)):
            return name
    if {"chosen", "rejected"} <= row.keys():
        return "pair"
    raise InputError(
        f"{where} has no known format: it has {', '.join(map(str, row)) or 'nothing'}; a "
        f"comparison has prompt, candidates and one of {', '.join(LABELS)}, or chosen and rejected"
    )


def _decoded(where: str, row: Row, tokenizer: PreTrainedTokenizerBase | None) -> Row:
    """A row whose texts are token ids: decode the texts, and keep the ids."""
    if isinstance(row["prompt"], str):
        return row
    if tokenizer is None:
        raise InputError(
            f"{where} has token ids instead of text; name the tokenizer that they belong to"
        )
    try:
        prompt, *candidates = (_tokens(r, tokenizer) for r in (row["prompt"], *row["candidates"]))
        texts = tokenizer.batch_decode([prompt, *candidates])
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: token ids cannot be decoded: {json.dumps(row)[:80]}") from error
    ids = {"prompt": prompt, "candidates": candidates}
    return {**row, "prompt": texts[0], "candidates": texts[1:], "ids": ids}


def _tokens(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids without padding."""
    size = len(tokenizer)
    kept = [i for i in ids if i < size or i != ZIEGLER_PAD]
    if any(i >= size for i in kept):
        raise ValueError(f"the tokenizer has {size} tokens")
    return kept
