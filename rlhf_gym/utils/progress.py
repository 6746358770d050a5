"""Progress bars with the time left."""

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
    """A label, a bar, `columns`, the time so far and the time left; silent without a terminal."""
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
