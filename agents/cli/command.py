"""Shared by all commands: parse the command line, run, and turn errors into exit statuses."""

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import agents
import rlhf_gym  # noqa: F401 (registers the environments)
from agents.cli.parsing import parse
from agents.cli.subcommands import called_as
from rlhf_gym.errors import InputError
from rlhf_gym.utils.devices import resolve_device
from rlhf_gym.utils.process import prepare_process
from rlhf_gym.utils.progress import quiet

Config = TypeVar("Config")
device = resolve_device

if "rlhf_gym" not in (agents.__doc__ or ""):
    sys.exit(
        "error: `import agents` finds another package (openai-agents has the same import name); "
        "keep the two in different virtual environments"
    )


def run(
    main: Callable[[Config], object],
    config_class: type[Config],
    doc: str | None,
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
    *,
    with_algorithm: bool = False,
    kept_as: str = "config.json",
    then: Callable[[Config], str] | None = None,
) -> NoReturn:
    """Parse the options of a command and run `main`. Never returns.

    The exit status is 0 for success, 2 for bad input (one line on stderr says what to fix) and 1
    for anything else.

    Args:
        main: The function that does the command's work.
        config_class: The dataclass of its options.
        doc: The description that --help shows.
        arguments: See `parse`.
        prog: See `parse`.
        with_algorithm: See `parse`.
        kept_as: See `parse`.
        then: Returns the text to print after success: where the results are and what to run next.
    """
    look_in_current_folder()
    try:
        config: Config = parse(
            config_class, doc, arguments, prog, with_algorithm=with_algorithm, kept_as=kept_as
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    code = status(main, config)
    if code == 0 and then is not None:
        print(then(config))
    sys.exit(code)


def look_in_current_folder() -> None:
    """Let modules in the current folder be imported: tasks, rewards and algorithms of the user.

    Python looks there for `python -m`, but not for an installed command or a script in another
    folder. The folder comes last, so no file in it can hide a module of an installed package.
    """
    here = os.getcwd()
    if not {"", here} & {*sys.path}:
        sys.path.append(here)


def status(main: Callable[[Config], object], config: Config) -> int:
    """Run `main(config)` and return the exit status."""
    quiet()
    prepare_process()
    try:
        main(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues it (policy: add --resume)", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def command_line(name: str, *arguments: object) -> str:
    """Format a command so that it can be copied and run.

    Args:
        name: A key of `SUBCOMMANDS`.
        *arguments: Its arguments, not yet quoted for the shell.
    """
    return f"{called_as(name)} {shlex.join(map(str, arguments))}"


def results_and_next(results: str, *commands: str) -> str:
    """Format the place of the results and the commands to run next, one line each."""
    lines = [f"results: {results}"]
    lines += [f"{'next:' if i == 0 else '':8} {line}" for i, line in enumerate(commands)]
    return "\n".join(lines)
