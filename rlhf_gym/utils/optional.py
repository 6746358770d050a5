"""Import of optional packages."""

import importlib
from typing import Any

from rlhf_gym.errors import InputError


def require(package: str, need: str, fix: str) -> Any:
    """Import and return an optional package.

    Args:
        package: Its import name.
        need: What needs it; the error message starts with this.
        fix: What the user can do if it is not installed; the error message ends with this.

    Raises:
        InputError: The package cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{need} ({error}): {fix}") from error
