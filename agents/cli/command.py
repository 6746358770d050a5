"""What every script shares: parse the command line, run, and turn errors into exit statuses."""

import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import tyro

import agents
import rlhf_gym  # noqa: F401 (registers the environments)
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
