"""The one error that means: the input is bad, and here is how to mend it."""


class InputError(ValueError):
    """Bad input from the user: a file, a row, a name or an option.

    The message names the thing and the mend. Scripts turn it into exit status 2.
    """


class UnreachableError(InputError):
    """A model, tokenizer or dataset is neither here nor on a hub that can be reached."""
