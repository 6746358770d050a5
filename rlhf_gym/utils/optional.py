"""Packages that only some need."""

import importlib
from typing import Any

from rlhf_gym.errors import InputError


def require(package: str, need: str, mend: str) -> Any:
    """A package by its import name.

    Args:
        package: The name.
        need: Who needs it.
        mend: What to do where it is not installed.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{need} ({error}): {mend}") from error
