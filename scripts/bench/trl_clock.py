"""Times of the steps of a TRL trainer. This module needs only transformers."""

import time

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Record the time of the start of training, and of the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Record the start of training."""
        self.times.append(time.perf_counter())

    def on_step_end(self, *_: object, **__: object) -> None:
        """Record the end of a step."""
        self.times.append(time.perf_counter())
