"""What is registered under an environment id, and the right id for one that was mistyped.

As in Gymnasium, an id may name the module that registers it: "my_module:namespace/Id-v0".
"""

import importlib
import sys
from pathlib import Path

import gymnasium
from gymnasium.envs.registration import (
    EnvSpec,
    find_highest_version,
    get_env_id,
    parse_env_id,
)

from rlhf_gym.errors import InputError
from rlhf_gym.utils.nearest import did_you_mean, nearest

OF_GYMNASIUM = ("gymnasium.", "shimmy.", "ale_py.")
"""How the entry points of the ids begin that Gymnasium registers by itself."""


def find_spec(env_id: str) -> EnvSpec:
    """Find what is registered under an id, and import the module that the id names.

    Args:
        env_id: "namespace/Id-v0" or "module:namespace/Id-v0". Without a version, it is the newest.

    Raises:
        InputError: There is no such module or id; the message has the nearest one.
    """
    module, colon, name = env_id.rpartition(":")
    if colon:
        _import(module, env_id)
    try:
        namespace, bare, version = parse_env_id(name)
        if version is None:
            name = get_env_id(namespace, bare, find_highest_version(namespace, bare))
        return gymnasium.spec(name)
    except gymnasium.error.Error as error:
        raise no_environment(env_id) from error


def short_id(env_id: str) -> str:
    """The id without the module that registers it."""
    return env_id.rpartition(":")[2]


def no_environment(env_id: str) -> InputError:
    """The error for an id that is not registered, with the nearest id or all that there are."""
    module, colon, name = env_id.rpartition(":")
    if right := nearest(name, gymnasium.registry):
        prefix = f"{module}:" if colon and right in _own_ids() else ""
        return InputError(f"no environment {env_id!r}; did you mean {prefix}{right}?")
    if colon:
        file = getattr(sys.modules.get(module), "__file__", None)
        ids = ", ".join(_own_ids())
        hint = f"; registered are {ids}" if ids else "; it must call gymnasium.register"
        return InputError(f"the module {module!r} ({file}) registers no environment {name!r}{hint}")
    ids = ", ".join(sorted(name for name in gymnasium.registry if name.startswith("rlhf_gym/")))
    return InputError(
        f"no environment {env_id!r}; there are {ids}. For a task of your own, give the module that "
        f"registers it too: MODULE:{name}"
    )


def _import(module: str, env_id: str) -> None:
    """Import the module that an id names."""
    if not module or module.startswith(".") or {*module} & {*"/\\:"}:
        raise InputError(
            f"{env_id!r}: {module!r} is not the dotted name of a module; write for example "
            "my_module:mine/Task-v0"
        )
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            # The module is there, but one that it needs is not.
            raise InputError(f"{env_id!r}: cannot import {module!r}: {error}") from error
        right = did_you_mean(module, [file.stem for file in Path.cwd().glob("*.py")])
        raise InputError(
            f"{env_id!r}: there is no module {module!r}"
            + (right or "; run this in its folder, or put that on the path: PYTHONPATH=FOLDER")
        ) from error


def _own_ids() -> list[str]:
    """Ids that neither Gymnasium nor this project has registered."""
    return sorted(
        name
        for name, spec in gymnasium.registry.items()
        if not name.startswith("rlhf_gym/")
        and not str(spec.entry_point or spec.vector_entry_point).startswith(OF_GYMNASIUM)
    )
