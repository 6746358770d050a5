"""The error for bad input. Its message says how to fix the input."""


class InputError(ValueError):
    """Bad input from the user: a file, a row, a name or an option.

    The message says what is wrong, where, and how to fix it. Commands then exit with status 2.
    """


class UnreachableError(InputError):
    """A model, tokenizer or dataset that is neither on this machine nor on a reachable hub."""


class RewardError(InputError):
    """A reward function fails, or returns something else than one finite number per response."""
