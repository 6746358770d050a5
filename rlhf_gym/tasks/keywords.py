"""What keywords an environment takes: name, type, default and description of each.

The functions that make environments pass most keywords on to others. `passes_on` says to whom, so
that the signatures and the `Args:` of docstrings stay the only place where a keyword is described.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast, get_type_hints

from docstring_parser import DocstringStyle, parse
from gymnasium.envs.registration import EnvSpec, load_env_creator

from rlhf_gym.errors import InputError
from rlhf_gym.tasks.registered import find_spec
from rlhf_gym.utils.nearest import did_you_mean
from rlhf_gym.utils.type_hints import described

Maker = TypeVar("Maker", bound=Callable[..., Any])
Defaults = Callable[..., Mapping[str, Any]]

REQUIRED = inspect.Parameter.empty
NOT_GIVEN = ("num_envs", "render_mode")
"""Keywords that whoever makes the environment sets in other ways."""

OF_MAKE_VEC = ("num_envs", "vectorization_mode", "vector_kwargs", "wrappers")
"""Registered keywords that `gymnasium.make_vec` itself reads."""


@dataclass(frozen=True)
class Keyword:
    """A keyword of an environment.

    Attributes:
        name: Its name.
        type: What it may be, in words.
        default: What it is if not given; `REQUIRED` if it must be given.
        description: What it does.
    """

    name: str
    type: str
    default: Any
    description: str


@dataclass(frozen=True)
class _PassesOn:
    target: Callable[..., Any]
    defaults: Defaults


_TARGETS: dict[Callable[..., Any], _PassesOn] = {}


def _nothing(**_: Any) -> Mapping[str, Any]:
    return {}


def passes_on(
    target: Callable[..., Any], defaults: Defaults = _nothing
) -> Callable[[Maker], Maker]:
    """Decorator of a function whose `**keywords` go to `target`.

    Args:
        target: The function that receives them.
        defaults: Values that the function passes where the user gives none. It is called with the
            keywords that the environment's id fixes.
    """

    def mark(maker: Maker) -> Maker:
        _TARGETS[maker] = _PassesOn(target, defaults)
        return maker

    return mark


def keywords_of(env_id: str) -> list[Keyword] | None:
    """The keywords of `gymnasium.make_vec(env_id)`; None if it takes any.

    Raises:
        InputError: No environment has this id, or only a single one can be made.
    """
    spec = find_spec(env_id)
    found = _keywords(spec)
    if found is None:
        return None
    # Gymnasium lets a caller override what an id fixes, but for the name of a published setting.
    shown = [word for word in found.values() if word.name not in {*NOT_GIVEN, "setting"}]
    fixed = spec.kwargs
    return [replace(w, default=fixed[w.name]) if w.name in fixed else w for w in shown]


def check_keywords(env_id: str, names: Iterable[str]) -> None:
    """Refuse keywords that an environment does not take, with the nearest that it does.

    The keywords that are registered with the id are checked too.

    Raises:
        InputError: One is unknown.
    """
    spec = find_spec(env_id)
    every = _keywords(spec)
    if every is None:
        return
    for name in spec.kwargs:
        if name not in every and name not in OF_MAKE_VEC:
            raise InputError(
                f"{env_id} is registered with the keyword {name!r}, which it does not take"
                f"{did_you_mean(name, every)}"
            )
    right = [word.name for word in keywords_of(env_id) or ()]
    for name in names:
        if name not in right:
            raise InputError(
                f"{env_id} takes no keyword {name!r}{did_you_mean(name, right)} "
                f"(--env {env_id} --env-kwargs help lists them)"
            )


def chosen_keywords(env_id: str) -> set[str]:
    """Names of the keywords that a task decides: registered with its id, or its function's own.

    Raises:
        InputError: No environment has this id, or only a single one can be made.
    """
    spec = find_spec(env_id)
    chosen = {*spec.kwargs}
    maker = _maker(spec)
    while maker in _TARGETS:
        chosen |= _declared(_TARGETS[maker], spec.kwargs).keys()
        maker = _TARGETS[maker].target
    return chosen


def _keywords(spec: EnvSpec) -> dict[str, Keyword] | None:
    """The keywords of the function that makes many rows, by name; None if it takes any."""
    return _follow(_maker(spec), spec.kwargs)


def _maker(spec: EnvSpec) -> Callable[..., Any]:
    """The function that makes many rows.

    Raises:
        InputError: There is none.
    """
    entry = spec.vector_entry_point
    if entry is None:
        raise InputError(
            f"{spec.id} is registered without a vector_entry_point, so only a single environment "
            "can be made. Give gymnasium.register one that returns a TokenVectorEnv, such as "
            "vector_entry_point='rlhf_gym.tasks.text:text_vector_env'"
        )
    return load_env_creator(entry) if isinstance(entry, str) else entry


def _declared(on: _PassesOn, fixed: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a function passes on where the user gives nothing, for the keywords of an id."""
    taken = inspect.signature(on.defaults).parameters
    return on.defaults(**{name: value for name, value in fixed.items() if name in taken})


def _follow(maker: Callable[..., Any], fixed: Mapping[str, Any]) -> dict[str, Keyword] | None:
    """The keywords of a function and of those that it passes them on to."""
    constructor = cast(Any, maker).__init__ if inspect.isclass(maker) else maker
    hints = get_type_hints(constructor)
    about = {
        p.arg_name: " ".join((p.description or "").split())
        for p in parse(maker.__doc__ or "", DocstringStyle.GOOGLE).params
    }
    own: dict[str, Keyword] = {}
    is_open = False
    for name, parameter in inspect.signature(maker).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = True
        else:
            kind = described(hints.get(name, Any))
            own[name] = Keyword(name, kind, parameter.default, about.get(name, ""))
    if not is_open:
        return own
    if maker not in _TARGETS:
        return None
    on = _TARGETS[maker]
    further = _follow(on.target, {})
    if further is None:
        return None
    values = _declared(on, fixed)
    for name, word in further.items():
        here = own.setdefault(name, replace(word, default=values.get(name, word.default)))
        if not here.description:
            own[name] = replace(here, description=word.description)
    return own
