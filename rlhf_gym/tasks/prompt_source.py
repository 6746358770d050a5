"""The prompts of an environment, from a file or dataset; what is left out is said."""

import logging
from collections.abc import Hashable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.bad_rows import BadRows, OnBadRow
from rlhf_gym.data.prompt_dataset import PromptDataset
from rlhf_gym.data.prompt_rows import load_texts
from rlhf_gym.data.prompts import Prompt
from rlhf_gym.data.row_problems import RowReport, by_reason
from rlhf_gym.preferences.formats import read_comparisons
from rlhf_gym.utils.once import warn_once

logger = logging.getLogger(__name__)


def read_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str | None,
    columns: Mapping[str, Any] | None,
    column: str | None,
    split: str,
    revision: str | None,
    on_bad_row: OnBadRow,
) -> tuple[list[Prompt | tuple[int, ...]], dict[str, int]]:
    """Read prompts; keywords as in `load_parts`, where they are called `prompt_format` and so on.

    Returns:
        The prompts, token ids among them if the format has them, and the number of rows that were
        skipped, by reason.

    Raises:
        InputError: The source cannot be read, or rows have no prompt and `on_bad_row` is "error".
    """
    if format is not None or columns is not None:
        return _compared(source, format, columns, split, revision, tokenizer)
    bad = BadRows()
    texts = load_texts(
        source,
        column=column,
        split=split,
        revision=revision,
        bad_rows=bad if on_bad_row == "skip" else None,
    )
    return list(texts), bad.counts


def warn_of_dropped(prompts: PromptDataset, source: str, options: Hashable) -> None:
    """Warn once of prompts that were dropped.

    A program makes several environments of the same prompts, for training and evaluation.

    Args:
        prompts: The prompts.
        source: Where they are from.
        options: What else decides which are dropped.
    """
    if line := prompts.dropped_line:
        warn_once(logger, f"{source}: {line}", (source, options))


def _compared(
    source: str,
    format: str | None,
    columns: Mapping[str, Any] | None,
    split: str,
    revision: str | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[Prompt | tuple[int, ...]], dict[str, int]]:
    """The prompts of comparisons; rows that are not comparisons are left out."""
    report = RowReport()
    rows = read_comparisons(
        source,
        format=format,
        columns=columns,
        skipped=report.skipped,
        report=report,
        tokenizer=tokenizer,
        split=split,
        revision=revision,
    )
    for line in (*(f"left out: {problem}" for problem in report.skipped[:3]), *report.lines()):
        warn_once(logger, f"{source}: {line}")
    prompts: list[Prompt | tuple[int, ...]] = []
    for row in rows:
        ids = row.with_own_ids(tokenizer, len(tokenizer)).ids
        # The messages of a chat say more than the ids that a template made of them.
        as_ids = isinstance(row.prompt, str) and ids is not None
        prompts.append(tuple(ids[0]) if as_ids and ids is not None else row.prompt)
    return prompts, by_reason(report.skipped)
