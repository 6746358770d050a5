"""Look up one option on a command line before all options are known.

--config and --algorithm decide which options exist, so they are read before tyro parses the rest.
"""

from collections.abc import Sequence


def given(arguments: Sequence[str], name: str) -> str | None:
    """Return the value of `--name VALUE` or `--name=VALUE`; the last one if it is repeated."""
    values = all_given(arguments, name)
    return values[0] if values else None


def all_given(arguments: Sequence[str], name: str) -> list[str]:
    """Return all values of an option that takes several; the last ones if it is repeated."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option.replace("_", "-") != f"--{name.replace('_', '-')}":
            continue
        found = [value] if equals else []
        for further in arguments[i + 1 :]:
            if further.startswith("--"):
                break
            found.append(further)
    return found
