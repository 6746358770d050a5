"""Import of sb3-contrib, an optional package."""

from typing import Any

from rlhf_gym.utils.optional import require


def contrib() -> Any:
    """Return the module `sb3_contrib`.

    Raises:
        InputError: It is not installed.
    """
    need, fix = "this algorithm needs sb3-contrib", "pip install 'rlhf-gym[contrib]'"
    return require("sb3_contrib", need, fix)
