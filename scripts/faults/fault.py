"""A fault, what must happen then, and what came of doing it once."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Result(NamedTuple):
    """What came of doing a fault once."""

    held: bool
    detail: str = ""
    figure: float | None = None  # the fault says in which unit


class Fault(NamedTuple):
    """A line of the table: what is done, and the promise that it must not break."""

    description: str
    promise: str
    inflict: Callable[[int, Path], Iterator[Result]]
    full: int  # how many times a full run of torture.py does it
    unit: str = ""  # of the figures
    shown: Callable[[list[float]], float] = max  # which of the figures the table shows


class Unavailable(Exception):
    """This machine lacks what the fault needs."""
