"""sb3-contrib, where it is installed."""

from typing import Any

from rlhf_gym.utils.optional import require


def contrib() -> Any:
    """The module `sb3_contrib`.

    Raises:
        InputError: It is not installed.
    """
    need, mend = "this algorithm is sb3-contrib's", "pip install 'rlhf-gym[contrib]'"
    return require("sb3_contrib", need, mend)
