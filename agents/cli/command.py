"""What every command shares: parse the command line, run, and turn errors into exit statuses."""

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
    """Parse the options of a command and run `main`; never returns.

    Exit status 0 is done, 2 bad input (a clear line on stderr), 1 anything else.

    Args:
        main: What the command does.
        config_class: Its options.
        doc: What --help says of it.
        arguments: As in `parse`, and so the next three.
        prog: As in `parse`.
        with_algorithm: As in `parse`.
        kept_as: As in `parse`.
        then: What is printed at the end: where the results are and what comes next.
    """
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
        print("stopped; the same command goes on (policy: with --resume)", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def command_line(name: str, *arguments: object) -> str:
    """A command that can be copied and run.

    Args:
        name: One of `SUBCOMMANDS`.
        *arguments: What follows it.
    """
    return f"{called_as(name)} {shlex.join(map(str, arguments))}"


def results_and_next(results: str, *commands: str) -> str:
    """Where results are, and the commands that may come next, a line each."""
    lines = [f"results: {results}"]
    lines += [f"{'next:' if i == 0 else '':8} {line}" for i, line in enumerate(commands)]
    return "\n".join(lines)
