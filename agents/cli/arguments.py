"""Look up an option on a command line before the options as a whole are known."""

from collections.abc import Sequence


def given(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option, as `--name VALUE` or `--name=VALUE`; the last one wins."""
    values = all_given(arguments, name)
    return values[0] if values else None


def all_given(arguments: Sequence[str], name: str) -> list[str]:
    """All values of an option that takes several; those of the last mention win."""
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
