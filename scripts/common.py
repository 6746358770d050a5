"""What every script shares: parse the command line, run, and turn errors into exit statuses."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import tyro

from rlhf_gym.errors import InputError

Config = TypeVar("Config")


def run(main: Callable[[Config], object], config_class: type[Config], doc: str | None) -> None:
    """Parse `config_class` from the command line and run `main`; never returns.

    Exit status 0 is done, 2 bad input (a clear line on stderr), 1 anything else.
    """
    sys.exit(status(main, tyro.cli(config_class, description=doc)))


def status(main: Callable[[Config], object], config: Config) -> int:
    """Run `main(config)` and say how it ended."""
    quiet()
    try:
        main(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def quiet() -> None:
    """Leave the terminal to our own progress bars."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
