"""From the rows of a source to what is needed of them; what is left out is said, never hidden."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from rlhf_gym.data.bad_rows import BadRows, RowError
from rlhf_gym.data.row_columns import unused_columns_line
from rlhf_gym.data.row_values import Read
from rlhf_gym.data.rows import check_split, load_rows
from rlhf_gym.errors import InputError
from rlhf_gym.utils.once import warn_once

T = TypeVar("T")

logger = logging.getLogger(__name__)


def convert_rows(
    source: str,
    convert: Callable[[str, Any], Read[T]],
    *,
    split: str,
    revision: str | None = None,
    bad_rows: BadRows | None = None,
    skip: str,
) -> list[T]:
    """Read a source and convert each of its rows.

    Columns that are not used, and rows that are left out, are named in a warning, once per process.

    Args:
        source: See `load_rows`.
        convert: From a row and its name; raises `RowError` for a row that cannot be used.
        split: Split of a folder or a dataset.
        revision: Commit or tag of a hub dataset.
        bad_rows: If given, rows that cannot be used are left out and added to it.
        skip: The option that asks for this, for the message of the error.

    Raises:
        InputError: The source is missing or empty, a file has no splits, no row can be used, or one
            cannot and `bad_rows` is None; the message names the first ones.
    """
    check_split(source, split)
    bad = BadRows() if bad_rows is None else bad_rows
    unread: list[str] = []
    try:
        rows = load_rows(source, split=split, revision=revision, skipped=unread)
    except InputError:
        bad.add_unread(unread)
        bad.refuse(source, 0, skip)
        raise
    bad.add_unread(unread)
    values: list[T] = []
    columns: set[str] = set()
    used: set[str] = set()
    notes: Counter[str] = Counter()
    for where, row in rows:
        try:
            read = convert(where, row)
        except RowError as error:
            bad.add(error)
            continue
        values.append(read.value)
        columns.update(row if isinstance(row, dict) else ())
        used.update(read.used)
        if read.note:
            notes[read.note] += 1
    if bad_rows is None or not values:
        bad.refuse(source, len(values), skip)
    if unused := columns - used:
        warn_once(logger, unused_columns_line(source, sorted(map(str, unused))))
    for note, n in notes.items():
        warn_once(logger, f"{source}: {n} of {len(rows)} rows: {note}")
    if bad:
        first = bad.problems[0]
        warn_once(logger, f"{bad.line(source, len(values))} and are left out; the first: {first}")
    return values
