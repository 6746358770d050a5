"""The one error that means: the input is bad, and here is how to fix it."""


class InputError(ValueError):
    """Bad input from the user: a file, a row, a name or an option.

    The message says what is wrong, where, and how to fix it. Scripts exit with status 2.
    """


class UnreachableError(InputError):
    """A model, tokenizer or dataset is neither on this machine nor on a hub that it can reach."""
