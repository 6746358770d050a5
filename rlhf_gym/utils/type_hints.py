"""Checks of values from a command line or a JSON file against type hints."""

import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from rlhf_gym.errors import InputError

NAMES: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    types.NoneType: "None",
}


def check_hints(function: Callable[..., object], values: Mapping[str, Any]) -> None:
    """Check keyword arguments of a function, or of a class's constructor, against its type hints.

    Args:
        function: The function or class.
        values: The arguments by name; without a type hint any value is accepted.

    Raises:
        InputError: A value does not fit its type hint.
    """
    hints = get_type_hints(function)
    for name, value in values.items():
        if problem := misfit(value, hints.get(name, Any)):
            raise InputError(f"{name}: {problem}")


def misfit(value: Any, hint: Any) -> str | None:
    """Describe how a value violates a type hint; None if it fits.

    A list fits a tuple, because JSON has no tuples, and a whole number fits `float`. Other hints
    (classes, callables) and the elements of a `Sequence` are not checked here; the receiver of the
    value checks them.
    """
    if _fits(value, hint):
        return None
    return f"{value!r} is not {_described(hint)}"


def _fits(value: Any, hint: Any) -> bool:
    if hint in NAMES:
        return _is_plain(value, hint)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        # Compare the types too, because 1 == True.
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple and parts[-1:] != (...,):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(parts)
            and all(map(_fits, value, parts))
        )
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(one, parts[0]) for one in value)
    return isinstance(value, list | tuple) if origin is Sequence else True


def _is_plain(value: Any, hint: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return hint is bool
    return isinstance(value, {int: Integral, float: Real}.get(hint, hint))


def _described(hint: Any) -> str:
    if hint in NAMES:
        return NAMES[hint]
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, parts))
    if origin is tuple and parts[-1:] != (...,):
        return f"a list of {len(parts)}"
    if origin in (list, tuple):
        return f"a list, each {_described(parts[0])}"
    return "a list" if origin is Sequence else str(getattr(hint, "__name__", hint))
