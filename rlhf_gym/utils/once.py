"""Warnings that a process shows once, however often their cause is met again."""

import logging
from collections.abc import Hashable

_said: set[Hashable] = set()


def warn_once(logger: logging.Logger, line: str, key: Hashable = None) -> None:
    """Log a warning, unless the process has already logged it.

    Args:
        logger: Where to log it.
        line: The warning.
        key: What makes two warnings the same; None takes the line itself.
    """
    key = line if key is None else key
    if key not in _said:
        _said.add(key)
        logger.warning("%s", line)
