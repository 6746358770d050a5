"""Columns of a data file that its reader does not use, for one line in the terminal."""

from collections.abc import Collection

MOST_NAMED = 20


def unused_columns_line(source: str, unused: Collection[str]) -> str:
    """One line that lists the columns of a source which are not used.

    Args:
        source: The file or dataset.
        unused: Names of the columns, in the order to show.

    Returns:
        "SOURCE: columns not used: a, b"; empty if there are none.
    """
    if not unused:
        return ""
    names = list(map(str, unused))
    more = len(names) - MOST_NAMED
    rest = f" and {more} more" if more > 0 else ""
    return f"{source}: columns not used: {', '.join(names[:MOST_NAMED])}{rest}"
