"""Comparisons from a file or dataset in any known format.

A format is a function from one row of the public file to rows of ours, and is recognised by its
keys. To add one, write such a function (see `rlhf_gym.preferences.public_formats`) and list it in
`FORMATS`.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.rows import load_rows
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.comparison import LABELS, Comparison
from rlhf_gym.preferences.comparison_rows import comparison_of
from rlhf_gym.preferences.public_formats import (
    Row,
    hh,
    llmbar,
    native,
    oasst,
    pair,
    pandalm,
    qa_feedback,
    scored,
    ziegler,
)

# The published files are padded with this id. GPT-2 has no such token.
ZIEGLER_PAD = 50259

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
        source: A path (see `rlhf_gym.data.row_files.read_rows`), or a dataset's name.
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
