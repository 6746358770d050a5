"""The right name for one that was mistyped."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was most likely meant; None if none is close.

    Capitals do not count, `-` and `_` are the same, and a namespace (`rlhf_gym/`) may be missing.
    """
    names = sorted(known)
    spelt = {_plain(right): right for right in names}
    for right in names:
        # A whole name wins over the last part of another.
        spelt.setdefault(_plain(right).split("/")[-1], right)
    close = get_close_matches(_plain(name), spelt, n=1)
    return spelt[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` to end a message with; empty if no known name is close."""
    right = nearest(name, known)
    return "" if right is None else f"; did you mean {right}?"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
