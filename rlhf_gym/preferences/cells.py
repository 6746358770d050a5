"""Values of single cells: a table in CSV has only texts, where JSON has numbers and lists."""

import json
import sys
from typing import Any

from rlhf_gym.errors import InputError

FLAGS = {"true": True, "1": True, "false": False, "0": False}


def number(name: str, value: Any) -> float:
    """The finite number in a cell, which may be written as a text.

    Raises:
        InputError: It is no number, or not finite.
    """
    found = value
    if isinstance(value, str):
        try:
            found = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
        except ValueError:
            found = None
    if isinstance(found, int | float) and not isinstance(found, bool):
        # Not math.isfinite: it raises on an integer that is too large for a float.
        if abs(found) <= sys.float_info.max:
            return found
    raise InputError(f"{name} must be a finite number, not {str(value)[:60]!r}")


def flag(name: str, value: Any) -> bool:
    """The True or False in a cell, which may be written as a text, 1 or 0.

    Raises:
        InputError: It is neither.
    """
    found = FLAGS.get(str(value).strip().lower())
    if found is None:
        raise InputError(f"{name} must be true or false, not {value!r}")
    return found


def listed(name: str, value: Any) -> list[Any]:
    """The list in a cell, which may be written as JSON text.

    Raises:
        InputError: It is no list.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is not a list in JSON: {error}") from error
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} must be a list, not {str(value)[:60]!r}")
    return list(value)
