"""Progress of a `transformers.Trainer`: a bar with the time left, or a few plain lines."""

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_gym.utils.progress import time_bar


class RichProgress(TrainerCallback):
    """Show updates as a bar on stderr; if stderr is not a terminal, print a line per tenth.

    Train inside ``with RichProgress(…) as progress``, so that an interrupted run restores the
    terminal. The loss is the last one that the Trainer logged, and plain lines are printed when it
    logs. So set `logging_steps` to a few hundredths of the run at most.

    Args:
        label: Text next to the bar, for example "reward model".
        console: Console to write to; None takes stderr.
        shown: Whether to show progress on stderr. Not used if `console` is given.
    """

    def __init__(self, label: str, console: Console | None = None, *, shown: bool = True) -> None:
        self.label = label
        self.console = console or Console(stderr=True, quiet=not shown)
        self._bar = time_bar(
            self.console, MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")
        )
        self._task = self._bar.add_task(label, total=None, start=False, loss="-")
        self._first_step = self._tenths = 0
        self._began = 0.0

    def __enter__(self) -> "RichProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Show the bar. A resumed run starts at the update where it stopped."""
        self._began, self._first_step = time.monotonic(), state.global_step
        self._tenths = 10 * state.global_step // max(state.max_steps, 1)
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._bar.start_task(self._task)
        self._bar.start()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Move the bar by one update."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Update the loss in the bar; without a terminal, print a line."""
        if not logs or "loss" not in logs:
            return
        loss = f"{float(logs['loss']):.4f}"
        self._bar.update(self._task, loss=loss)
        tenths = 10 * state.global_step // max(state.max_steps, 1)
        if self.console.is_terminal or tenths <= self._tenths:
            return
        self._tenths = tenths
        seconds_each = (time.monotonic() - self._began) / (state.global_step - self._first_step)
        left = timedelta(seconds=round(seconds_each * (state.max_steps - state.global_step)))
        self.console.print(
            f"{self.label}: {state.global_step}/{state.max_steps} updates, loss {loss}, "
            f"{left} left",
            highlight=False,
        )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop the bar where it is."""
        self._bar.stop()
