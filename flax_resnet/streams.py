"""The standard streams: no run ends for want of a listener, and no output is lost in silence."""

import contextlib
import io
import os
import sys
from typing import Any, TextIO


class Unheard:
    """A stream to people who may be gone: a closed terminal, or a full disk, ends no run."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def prepare_streams() -> None:
    """Lets no message end a run: neither by whom it does not reach nor by its characters."""
    sys.stdout = sys.stdout or nowhere()  # None: closed by whoever started this process
    if not isinstance(sys.stderr, Unheard):
        sys.stderr = Unheard(sys.stderr or nowhere())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def nowhere() -> TextIO:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def write_out() -> None:
    """Writes what was printed and still waits, now rather than when the interpreter ends.

    Raises:
        OSError: it cannot be written. What is left of it is dropped.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with nowhere() as drain:
            os.dup2(drain.fileno(), sys.stdout.fileno())
        raise
