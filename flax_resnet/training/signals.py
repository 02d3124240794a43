"""Signals that ask a run to save its state and stop."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM or SIGINT arrives, whose number it then holds.

    A second signal acts at once, as if this were not here.
    """
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield received
    finally:
        for number in numbers:
            signal.signal(number, previous[number])
