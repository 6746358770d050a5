"""Stop a training after its current update when SIGTERM or Ctrl-C asks for it."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody has asked the training to stop.

    Attributes:
        asked: True once they have.
    """

    asked = False


@contextmanager
def stop_when_asked() -> Iterator[StopRequest]:
    """Let SIGTERM and Ctrl-C ask for a stop; a second one stops at once.

    Python delivers signals to the main thread only; in another thread nothing is ever asked.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True
        print(
            "stopping after this update, with a checkpoint; once more to stop at once",
            file=sys.stderr,
        )

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
