"""The command line, `rlhf-gym COMMAND …`. In a checkout, scripts/*.py call the same commands."""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from agents.cli.subcommands import SUBCOMMANDS

HELP = ("help", "-h", "--help")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command named by the first argument. Never returns.

    It imports only that command's module, because torch and transformers take seconds to import
    and `rlhf-gym --help` should answer at once.

    Args:
        arguments: The words after `rlhf-gym`; None reads them from `sys.argv`.
    """
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["help"]
    if name in HELP and rest and rest[0] in SUBCOMMANDS:
        name, rest = rest[0], ["--help"]
    if name in HELP:
        print(overview())
        sys.exit(0)
    if name == "--version":
        from rlhf_gym import __version__

        print(f"rlhf-gym {__version__}")
        sys.exit(0)
    if name not in SUBCOMMANDS:
        from rlhf_gym.utils.nearest import did_you_mean

        hint = did_you_mean(name, SUBCOMMANDS) or "; rlhf-gym --help lists all"
        print(f"error: rlhf-gym has no command {name!r}{hint}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(f"agents.cli.{SUBCOMMANDS[name].module}")
    module.cli(rest, f"rlhf-gym {name}")
    raise AssertionError(f"{module.__name__}.cli returned")


def overview() -> str:
    """List all commands, one per line."""
    width = max(map(len, SUBCOMMANDS))
    return "\n".join(
        [
            "RLHF as a standard RL benchmark. usage: rlhf-gym COMMAND [OPTIONS]",
            "",
            *(f"  {name:{width}}  {command.help}" for name, command in SUBCOMMANDS.items()),
            "",
            "rlhf-gym COMMAND --help shows the options of a command. --config FILE reads them from",
            "a YAML or JSON file or from a run folder. rlhf-gym --version shows the version.",
        ]
    )
