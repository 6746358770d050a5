"""Comparisons from a file or dataset: in any known format, or with a map of its columns."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_gym.data.row_columns import unused_columns_line
from rlhf_gym.data.row_problems import SKIP_HINT, RowReport, refusal, summary
from rlhf_gym.data.rows import load_rows
from rlhf_gym.errors import InputError
from rlhf_gym.preferences.column_map import ColumnMap
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.comparison_rows import comparison_of
from rlhf_gym.preferences.dialogues import Row
from rlhf_gym.preferences.known_formats import FORMATS, recognise
from rlhf_gym.preferences.rating_formats import Rating, grouped
from rlhf_gym.preferences.repair import repaired

logger = logging.getLogger(__name__)

# The published files are padded with this id. GPT-2 has no such token.
ZIEGLER_PAD = 50259

Columns = Mapping[str, Any] | Sequence[str]
"""A map of columns: {"prompt": "question", …}, or words "prompt=question"."""


def read_comparisons(
    source: str | Path,
    *,
    format: str | None = None,
    columns: Columns | None = None,
    skipped: list[str] | None = None,
    report: RowReport | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str = "train",
    revision: str | None = None,
) -> list[Comparison]:
    """Read comparisons from a file, or from a dataset of the `datasets` library.

    Args:
        source: A path (see `rlhf_gym.data.row_files.read_rows`), or a dataset's name.
        format: A key of `rlhf_gym.preferences.known_formats.FORMATS`; found from each row's keys if
            None.
        columns: Which column is what, in place of a format (see
            `rlhf_gym.preferences.column_map`). None or empty reads a known format.
        skipped: If given, bad rows are left out and the problem of each is appended here; of a
            list of answers only a bad candidate is left out, if the label of the others is known.
        report: Receives what was repaired, which columns were not used, and the format if all rows
            have the same. If None, the first two are logged.
        tokenizer: Decodes the token ids of files without text.
        split: Split of a `datasets` dataset.
        revision: Commit or tag of a hub dataset.

    Raises:
        InputError: The source cannot be read, is empty, or has rows that are not comparisons; the
            message names the first of them.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if columns and format is not None:
        raise InputError(f"columns take the place of a format; give no format {format!r} too")
    own = RowReport()
    problems = own.skipped if skipped is None else skipped
    mapped = ColumnMap.parse(columns) if columns else None
    try:
        rows = load_rows(str(source), split=split, revision=revision, skipped=problems)
    except InputError:
        # A file without a single good line has no rows, but that is not the reason.
        if skipped is None and problems:
            raise refusal(problems, None) from None
        raise
    if mapped is not None:
        mapped = mapped.settled(str(source), [row for _, row in rows if isinstance(row, dict)])
    reader = _Reader(format, mapped, tokenizer)
    slots = reader.slots(rows, problems)
    found = [*_checked(slots, problems, own.repaired, skipped is not None)]
    own.unused = list(reader.unused)
    own.format = next(iter(reader.formats)) if len(reader.formats) == 1 else None
    if skipped is None and problems:
        is_any_left = bool(found) or any(_checked(slots, [], [], True))
        raise refusal(problems, SKIP_HINT if is_any_left else None)
    if not found:
        reasons = summary(problems, "row left out", "rows left out")
        raise InputError(f"{source} has no comparisons{f': {reasons}' if reasons else ''}")
    if report is not None:
        report.repaired += own.repaired
        report.unused += own.unused
        report.format = own.format
    else:
        _log(str(source), own)
    return found


def _log(source: str, report: RowReport) -> None:
    if line := unused_columns_line(source, report.unused):
        logger.info("%s", line)
    for line in report.lines():
        logger.warning("%s: %s", source, line)


def _checked(
    slots: Sequence[tuple[str, Row | list[Rating]]],
    problems: list[str],
    repairs: list[str],
    may_repair: bool,
) -> Iterator[Comparison]:
    """The comparisons among rows of the project's format and groups of ratings."""
    for where, one in slots:
        row: Row | None = None
        try:
            if isinstance(one, list):
                where = f"{where} and {len(one) - 1} more rows" if len(one) > 1 else where
                try:
                    row = grouped(one)
                except InputError as error:
                    raise InputError(f"{where}: {error}") from error
            else:
                row = one
            yield comparison_of(where, row)
        except InputError as error:
            saved = repaired(row) if may_repair else None
            try:
                if saved is None:
                    raise
                yield comparison_of(where, saved[0])
                repairs += [f"{where}: {reason}" for reason in saved[1]]
            except InputError:
                problems.append(str(error))


class _Reader:
    """Turns the rows of a file into rows of the project's format and groups of ratings.

    Attributes:
        unused: The columns that were not used, in the order in which they occurred.
        formats: The formats of the rows that could be read; none with a map of columns.
    """

    def __init__(
        self,
        format: str | None,
        columns: ColumnMap | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """A reader of one format, of a map of columns, or of whatever format each row has."""
        self.format, self.columns, self.tokenizer = format, columns, tokenizer
        self.unused: dict[str, None] = {}
        self.formats: set[str] = set()
        self._used: set[str] = set()

    def slots(
        self, rows: Sequence[tuple[str, Any]], problems: list[str]
    ) -> list[tuple[str, Row | list[Rating]]]:
        """What each row is, with its name; a group of ratings has the place of its first row."""
        slots: list[tuple[str, Row | list[Rating]]] = []
        groups: dict[str, list[Rating]] = {}
        for where, row in rows:
            try:
                found = self._converted(where, row)
            except InputError as error:
                problems.append(str(error))
                continue
            for i, one in enumerate(found, 1):
                if not isinstance(one, Rating):
                    slots.append((where if len(found) == 1 else f"{where}, group {i}", one))
                elif one.key in groups:
                    groups[one.key].append(one)
                else:
                    groups[one.key] = [one]
                    slots.append((where, groups[one.key]))
        for column in self._used:
            self.unused.pop(column, None)
        return slots

    def _converted(self, where: str, row: Any) -> list[Row | Rating]:
        if not isinstance(row, dict):
            raise InputError(f"{where}: an object is needed, not {str(row)[:60]!r}")
        name = "columns"
        try:
            if self.columns is None:
                # A row of a dataset has all columns, null if absent.
                name = self.format or recognise({k: v for k, v in row.items() if v is not None})
            reader = FORMATS[name] if self.columns is None else self.columns
            found = list(reader.read(row))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except (
            *(KeyError, TypeError, ValueError, AttributeError, IndexError),
            *(OverflowError, RecursionError),
        ) as error:
            raise InputError(
                f"{where} is not of the format {name!r}: {type(error).__name__} {error}"
            ) from error
        if self.columns is None:
            self.formats.add(name)
        for column, value in row.items():
            if value is None:
                continue
            # Another row may have another format, which uses what this one does not.
            if column in self._used or (isinstance(column, str) and reader.reads(column)):
                self._used.add(column)
            else:
                self.unused[column] = None
        if name == "ziegler":
            return [_decoded(where, one, self.tokenizer) for one in found if isinstance(one, dict)]
        return found


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
