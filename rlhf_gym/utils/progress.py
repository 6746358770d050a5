"""Progress bars with the remaining time."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def time_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """Return a bar with label, `columns`, elapsed and remaining time; hidden without a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


@contextmanager
def progress_bar(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar with the remaining time; yield the function that advances it by n steps.

    Args:
        label: Text before the bar.
        total: Steps in all.
        shown: If False, write nothing.
    """
    console = Console(stderr=True, quiet=not shown)
    bar = time_bar(console, MofNCompleteColumn())
    if not console.is_terminal:
        console.print(f"{label}: {total}", highlight=False)
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def quiet() -> None:
    """Silence transformers for the rest of the process, so that only our own bars are shown."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def transformers_quiet() -> Iterator[None]:
    """Leave the terminal to our own progress bars inside a `with` block, then as it was."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
