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

import rlhf_gym  # noqa: F401 (registers the environments)


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
        disable=not console.is_terminal,
    )


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with the remaining time; yield the function that advances it by n steps."""
    console = Console(stderr=True)
    bar = time_bar(console, MofNCompleteColumn())
    if not console.is_terminal:
        console.print(f"{label}: {total}", highlight=False)
    with bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def quiet() -> None:
    """Silence transformers, so that only our own progress bars use the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
