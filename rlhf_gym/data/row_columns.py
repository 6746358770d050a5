"""Columns of a file's rows that nothing reads, named so that a user sees what was ignored."""

from collections.abc import Iterable


def unused_columns_line(source: str, unused: Iterable[str]) -> str:
    """The line that names a source's columns that are not used."""
    return f"{source}: columns not used: {', '.join(sorted(map(str, unused)))}"
