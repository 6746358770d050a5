"""Set up a run: check and create its folder, record its options, make its environment."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gymnasium

import rlhf_gym  # noqa: F401 (registers the environments)
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.rewards.callables import absolute_names, current_name
from rlhf_gym.tasks.keywords import check_keywords, chosen_keywords
from rlhf_gym.tasks.registered import find_spec
from rlhf_gym.utils.devices import resolve_device
from rlhf_gym.utils.files import check_folder, read_json, write_json

PLACES = ("resume", "run_dir", "device", "wandb")
"""Options that do not affect the result, so a continued run may change them."""


def check_same_run(run_dir: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Check that a run folder is new, or contains the same run and may be continued.

    Args:
        run_dir: The run folder.
        config: The options of the run that is about to start.
        resume: Whether a stopped run may be continued.

    Raises:
        InputError: It is a file, or the folder contains a run with other options, or a stopped run
            and `resume` is False.
    """
    check_folder(run_dir)
    file = run_dir / "config.json"
    if not file.exists():
        return
    if not resume and (run_dir / "checkpoints").exists():
        raise InputError(
            f"{run_dir} contains a stopped run; continue it with --resume, or give another "
            "--run-dir"
        )
    other = other_options(file, config)
    if resume and other:
        raise InputError(
            f"{run_dir} contains a run with {listed(other)}; give the same options to continue it, "
            "or another --run-dir"
        )


def other_options(file: Path, config: dict[str, Any]) -> list[str]:
    """List where a config differs from a file in options that affect the result; see `apart`."""
    before, now = (
        {key: value for key, value in options.items() if key not in PLACES}
        for options in (read_json(file), json.loads(json.dumps(config, default=str)))
    )
    return apart(before, now)


def apart(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the options that differ, each as "NAME = RECORDED VALUE, not NEW VALUE".

    The names of nested options are joined by dots.

    Args:
        there: The recorded options, as JSON values.
        now: The new options, as JSON values.
    """
    absent = "(no such option)"
    before, after = _current_names(flat(there)), flat(now)
    pairs = {n: (before.get(n, absent), after.get(n, absent)) for n in before | after}
    return [f"{name} = {a}, not {b}" for name, (a, b) in sorted(pairs.items()) if a != b]


def _current_names(options: dict[str, Any]) -> dict[str, Any]:
    """Replace former names of functions by the present ones (`current_name`)."""
    return {k: current_name(v) if isinstance(v, str) else v for k, v in options.items()}


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """Flatten nested options: "group.name", but no prefix for those of the algorithm.

    This is how the command line names them too.
    """
    out: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            prefix = "" if name == "algorithm_options" else f"{name}."
            out |= {f"{prefix}{inner}": x for inner, x in flat(value).items()}
        else:
            out[name] = value
    return out


def listed(differences: list[str], most: int = 5) -> str:
    """Join the first differences. A folder of another script can have dozens."""
    more = len(differences) - most
    return ", ".join(differences[:most]) + (f" and {more} more" if more > 0 else "")


def begin_run(run_dir: Path, config: dict[str, Any]) -> None:
    """Create the run folder and record the options in its config.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", config)


def parse_values(texts: dict[str, str]) -> dict[str, Any]:
    """Parse keyword values from the command line: JSON, or True, False or None; else text."""
    constants = {"True": "true", "False": "false", "None": "null"}

    def value(text: str) -> Any:
        try:
            return json.loads(constants.get(text, text))
        except (ValueError, RecursionError):
            return text

    return {key: value(text) for key, text in texts.items()}


def with_absolute_files(env_kwargs: dict[str, str]) -> dict[str, str]:
    """Return the keywords with each "file.py:function" by its whole path.

    A run folder records them so, because another command may start in another folder.
    """
    out = {}
    for name, value in parse_values(env_kwargs).items():
        absolute = absolute_names(value)
        changed = absolute if isinstance(absolute, str) else json.dumps(absolute)
        out[name] = env_kwargs[name] if absolute == value else changed
    return out


def env_keywords(env_kwargs: dict[str, str], device: str) -> dict[str, Any]:
    """Return the keywords that a command line asks for.

    Args:
        env_kwargs: Value of --env-kwargs; its `device` wins over --device.
        device: Value of --device. "auto" leaves the choice to the environment: the device
            registered with its id, else the GPU if there is one.

    Raises:
        InputError: torch does not have the device.
    """
    asked = {} if device == "auto" else {"device": resolve_device(device)}
    return {**asked, **parse_values(env_kwargs)}


def make_env(
    env_id: str,
    num_envs: int,
    keywords: dict[str, Any],
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> TokenVectorEnv:
    """Call `gymnasium.make_vec`.

    Args:
        env_id: The id, or "module:id" with the module that registers it.
        num_envs: Number of rows.
        keywords: Keywords that the user asks for. They win over those registered with the id.
        defaults: Keywords that the command prefers. Those that the task decides win over them (see
            `chosen_keywords`).

    Raises:
        InputError: The id or a keyword is unknown, or the environment cannot be made with them.
    """
    check_keywords(env_id, keywords)
    if "num_envs" in find_spec(env_id).kwargs:
        # Gymnasium would use it, and ignore the number that the command asks for.
        raise InputError(
            f"{env_id} is registered with num_envs; leave it out there, because the command "
            "chooses the number of rows (--num-envs)"
        )
    chosen = chosen_keywords(env_id)
    preferred = {name: value for name, value in defaults.items() if name not in chosen}
    try:
        env = gymnasium.make_vec(env_id, num_envs=num_envs, **{**preferred, **keywords}).unwrapped
    except gymnasium.error.Error as error:
        raise InputError(f"cannot make the environment {env_id!r}: {error}") from error
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise InputError(
            f"the keywords do not fit {env_id!r}: {error}; they are those registered with the id "
            "and those of --env-kwargs"
        ) from error
    if not isinstance(env, TokenVectorEnv):
        raise InputError(
            f"{env_id!r} is not an environment of this project: its vector_entry_point must "
            f"return a TokenVectorEnv, not a {type(env).__name__}"
        )
    return env
