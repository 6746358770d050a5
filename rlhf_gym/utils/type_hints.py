"""Checks of values from a command line or a JSON file against type hints."""

import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from rlhf_gym.errors import InputError

NAMES: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    types.NoneType: "None",
    Path: "a path",
}


# What JSON has in their place fits too.
_PLAIN: dict[Any, Any] = {int: Integral, float: Real, Path: (str, Path)}


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
    return f"{value!r} is not {described(hint)}"


def as_hinted(value: Any, hint: Any) -> Any:
    """A value of JSON as its hint has it: a list as a tuple, a text as a `Path`, 1 as 1.0.

    Raises:
        InputError: It does not fit.
    """
    if problem := misfit(value, hint):
        raise InputError(problem)
    return _converted(value, hint)


def _converted(value: Any, hint: Any) -> Any:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _converted(value, next(part for part in parts if _fits(value, part)))
    if hint in (float, Path):
        return hint(value)
    if origin is tuple:
        hints = parts[:1] * len(value) if parts[-1:] == (...,) else parts
        return tuple(map(_converted, value, hints))
    return value


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
    if origin is dict:
        return isinstance(value, dict)
    return isinstance(value, list | tuple) if origin is Sequence else True


def _is_plain(value: Any, hint: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return hint is bool
    return isinstance(value, _PLAIN.get(hint, hint))


def described(hint: Any) -> str:
    """What a value with this hint may be, in words."""
    if hint in NAMES:
        return NAMES[hint]
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(described, parts))
    if origin is tuple and parts[-1:] != (...,):
        return f"a list of {len(parts)}"
    if origin in (list, tuple):
        return f"a list, each {described(parts[0])}"
    if origin is dict:
        return "a mapping of names to values"
    return "a list" if origin is Sequence else str(getattr(hint, "__name__", hint))
