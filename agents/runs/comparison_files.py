"""Read comparisons from files and datasets, report bad rows, and convert comparisons."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_gym.data.bad_rows import OnBadRow
from rlhf_gym.data.row_columns import unused_columns_line
from rlhf_gym.data.row_problems import RowReport
from rlhf_gym.errors import InputError
from rlhf_gym.lm.loading import load_tokenizer
from rlhf_gym.preferences.comparison import Comparison, write_comparisons
from rlhf_gym.preferences.formats import Columns, read_comparisons
from rlhf_gym.preferences.survey import survey
from rlhf_gym.utils.files import check_folder


def load_comparisons(
    source: str,
    *,
    format: str | None = None,
    columns: Columns | None = None,
    on_bad_row: OnBadRow = "error",
    tokenizer: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> tuple[list[Comparison], RowReport]:
    """Read comparisons, and print what was left out, repaired and not used.

    Args:
        source: A file, or a dataset of the `datasets` library.
        format: Format of the rows, a key of `FORMATS` in `rlhf_gym.preferences.known_formats`;
            None recognises each row by its keys.
        columns: Which column is what, in place of a format.
        on_bad_row: What to do with a row that is not a comparison: stop, or leave it out.
        tokenizer: Tokenizer of files that have token ids instead of text: a hub name or a path.
        split: Split of a `datasets` dataset.
        revision: Commit or tag of a hub dataset.

    Returns:
        The comparisons, and what was left out, repaired and not used.

    Raises:
        InputError: The source cannot be read, it has a bad row and `on_bad_row` is "error", or
            all its rows are bad.
    """
    report = RowReport()
    try:
        comparisons = read_comparisons(
            source,
            format=format,
            columns=columns,
            skipped=report.skipped if on_bad_row == "skip" else None,
            report=report,
            tokenizer=None if tokenizer is None else load_tokenizer(tokenizer),
            split=split,
            revision=revision,
        )
    finally:
        # In `finally`, because these lines explain the error that is raised if all rows are bad.
        for problem in report.skipped:
            print(f"skipped: {problem}")
    for repair in report.repaired:
        print(f"repaired: {repair}")
    for line in [unused_columns_line(source, report.unused), *report.lines()]:
        if line:
            print(line)
    return comparisons, report


def convert_comparisons(
    source: str,
    output: Path,
    *,
    format: str | None = None,
    columns: Columns | None = None,
    on_bad_row: OnBadRow = "error",
    tokenizer: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> dict[str, Any]:
    """Write comparisons of any format as the project's JSON Lines.

    Args:
        source: See `load_comparisons`, also for the keyword arguments.
        output: File to write. Its name must end in .jsonl, and it must not exist yet.
        format: Format of the rows.
        columns: Which column is what, in place of a format.
        on_bad_row: What to do with a row that is not a comparison.
        tokenizer: Tokenizer of token ids.
        split: Split of a `datasets` dataset.
        revision: Commit or tag of a hub dataset.

    Returns:
        The counts of `survey`, how many rows were left out (`skipped`), and what was left out and
        repaired by reason (`rows`).

    Raises:
        InputError: The output's name does not end in .jsonl, the output exists, or the source
            cannot be read.
    """
    # A file with another ending would be read back as plain text, one text per line.
    if output.suffix != ".jsonl":
        raise InputError(f"--output must end in .jsonl, unlike {output}")
    check_folder(output.parent)
    if output.exists():
        raise InputError(f"{output} already exists; give another file, or move this one away")
    comparisons, report = load_comparisons(
        source,
        format=format,
        columns=columns,
        on_bad_row=on_bad_row,
        tokenizer=tokenizer,
        split=split,
        revision=revision,
    )
    counts = {**survey(comparisons), "skipped": len(report.skipped), "rows": report.figures()}
    write_whole(output, comparisons)
    return counts


def write_whole(output: Path, comparisons: Sequence[Comparison]) -> None:
    """Write comparisons under a temporary name, and rename the file when it is complete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        write_comparisons(partial, comparisons)
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
