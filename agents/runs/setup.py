"""What comes before a run: its folder, its options, its environment."""

import json
from pathlib import Path
from typing import Any

import gymnasium

import rlhf_gym  # noqa: F401 (registers the environments)
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.tasks.keywords import check_keywords, no_environment
from rlhf_gym.utils.files import read_json, write_json

PLACES = ("resume", "run_dir", "device", "wandb")
"""Options that say where and how to run; the result does not depend on them."""


def check_same_run(run_dir: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Make sure that a run folder is empty or holds the same run, stopped.

    Raises:
        InputError: It holds another run, or one that `resume` was not asked for.
    """
    file = run_dir / "config.json"
    if not file.exists():
        return
    if not resume and (run_dir / "checkpoints").exists():
        raise InputError(f"{run_dir} holds a stopped run; --resume goes on, or name another folder")
    other = other_options(file, config)
    if resume and other:
        raise InputError(
            f"{run_dir} holds a run with {listed(other)}; give the same options to go on, or "
            "another --run-dir"
        )


def other_options(file: Path, config: dict[str, Any]) -> list[str]:
    """Where a config differs from a file's in options that matter to a result; see `apart`."""
    before, now = (
        {key: value for key, value in options.items() if key not in PLACES}
        for options in (read_json(file), json.loads(json.dumps(config, default=str)))
    )
    return apart(before, now)


def apart(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Where two sets of options differ: a `NAME = VALUE, not VALUE` for each that does.

    Args:
        there: The options of what is there, as JSON has them.
        now: Those that were asked for. Names of nested ones are joined by dots.
    """
    absent = "(no such option)"
    before, after = flat(there), flat(now)
    pairs = {n: (before.get(n, absent), after.get(n, absent)) for n in before | after}
    return [f"{name} = {a}, not {b}" for name, (a, b) in sorted(pairs.items()) if a != b]


def flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options without nesting; an algorithm's have their own names, as on the command line."""
    out: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            prefix = "" if name == "algorithm_options" else f"{name}."
            out |= {f"{prefix}{inner}": x for inner, x in flat(value).items()}
        else:
            out[name] = value
    return out


def listed(differences: list[str], most: int = 5) -> str:
    """The first differences; a folder of another script has dozens."""
    more = len(differences) - most
    return ", ".join(differences[:most]) + (f" and {more} more" if more > 0 else "")


def begin_run(run_dir: Path, config: dict[str, Any]) -> None:
    """Make the run folder and note its options."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", config)


def parse_values(texts: dict[str, str]) -> dict[str, Any]:
    """Keywords from the command line: values are JSON or Python's constants, else strings."""
    constants = {"True": "true", "False": "false", "None": "null"}

    def value(text: str) -> Any:
        try:
            return json.loads(constants.get(text, text))
        except ValueError:
            return text

    return {key: value(text) for key, text in texts.items()}


def make_env(env_id: str, num_envs: int, keywords: dict[str, Any]) -> TokenVectorEnv:
    """`gymnasium.make_vec`, with unknown ids and keywords as input errors."""
    if env_id in gymnasium.registry:
        check_keywords(env_id, keywords)
    try:
        env = gymnasium.make_vec(env_id, num_envs=num_envs, **keywords).unwrapped
    except gymnasium.error.UnregisteredEnv as error:
        raise no_environment(env_id) from error
    except gymnasium.error.Error as error:
        raise InputError(f"cannot make the environment {env_id!r}: {error}") from error
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise InputError(f"--env-kwargs do not fit {env_id!r}: {error}") from error
    if not isinstance(env, TokenVectorEnv):
        raise InputError(f"{env_id!r} is not an environment of this project")
    return env
