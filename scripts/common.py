"""What every script shares: parse the command line, run, and turn errors into exit statuses."""

import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import gymnasium
import torch
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn

import agents
import rlhf_gym  # noqa: F401 (registers the environments)
from rlhf_gym.devices import resolve_device
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError
from rlhf_gym.files import read_json, write_json
from rlhf_gym.process import prepare_process
from rlhf_gym.progress import time_bar

Config = TypeVar("Config")
device = resolve_device

if "rlhf_gym" not in (agents.__doc__ or ""):
    sys.exit(
        "error: `import agents` finds another package (openai-agents has the same import name); "
        "keep the two in different virtual environments"
    )


def run(main: Callable[[Config], object], config_class: type[Config], doc: str | None) -> None:
    """Parse `config_class` from the command line and run `main`; never returns.

    Exit status 0 is done, 2 bad input (a clear line on stderr), 1 anything else.
    """
    sys.exit(status(main, tyro.cli(config_class, description=doc)))


def status(main: Callable[[Config], object], config: Config) -> int:
    """Run `main(config)` and say how it ended."""
    quiet()
    prepare_process()
    try:
        main(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on (train_policy.py: with --resume)", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


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
    places = ("resume", "run_dir", "device", "wandb")
    before, now = (
        {key: value for key, value in options.items() if key not in places}
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
    out = {}
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


def run_beside(python: Path, script: str, folder: Path) -> dict[str, Any]:
    """Run a script beside this one on a folder, by some Python; the JSON that it prints last.

    Raises:
        InputError: It failed there.
    """
    file = Path(__file__).with_name(script)
    done = subprocess.run([str(python), str(file), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{script} failed in {python}:\n{done.stderr[-2000:]}")
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise InputError(
            f"{script} did not end with a line of JSON in {python}; it printed:\n"
            f"{done.stdout[-1000:]}{done.stderr[-1000:]}"
        ) from error
    return found


def measured_on(where: str) -> dict[str, Any]:
    """What a figure of speed depends on beside the versions: the machine and the commit.

    Args:
        where: The device.
    """
    name = platform.processor() or platform.machine()
    known = Path("/proc/cpuinfo")
    if known.exists():
        names = [x for x in known.read_text().splitlines() if x.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = None
    return {
        "processor": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if where.startswith("cuda") else None,
        "commit": commit,
    }


def make_env(env_id: str, num_envs: int, keywords: dict[str, Any]) -> TokenVectorEnv:
    """`gymnasium.make_vec`, with unknown ids and keywords as input errors."""
    try:
        env = gymnasium.make_vec(env_id, num_envs=num_envs, **keywords).unwrapped
    except gymnasium.error.Error as error:
        raise InputError(f"cannot make the environment {env_id!r}: {error}") from error
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise InputError(f"--env-kwargs do not fit {env_id!r}: {error}") from error
    if not isinstance(env, TokenVectorEnv):
        raise InputError(f"{env_id!r} is not an environment of this project")
    return env


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; yields the function that advances it."""
    console = Console(stderr=True)
    bar = time_bar(console, MofNCompleteColumn())
    if not console.is_terminal:
        console.print(f"{label}: {total}", highlight=False)
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def quiet() -> None:
    """Leave the terminal to our own progress bars."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
