"""sb3-contrib, where it is installed."""

import importlib
from typing import Any

from rlhf_gym.errors import InputError


def contrib() -> Any:
    """The module `sb3_contrib`.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module("sb3_contrib")
    except ImportError as error:
        raise InputError(
            f"this algorithm is sb3-contrib's ({error}): pip install 'rlhf-gym[contrib]'"
        ) from error
