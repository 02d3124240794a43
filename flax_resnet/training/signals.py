"""Signals that ask a run to save its state and stop."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from types import FrameType
from typing import NoReturn

import jax

log = logging.getLogger(__name__)

# What kill, Ctrl-C, a closed terminal, and Slurm before its time limit (--signal=USR1) send.
SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    if name in signal.Signals.__members__  # Windows lacks some
)
SECONDS_TO_LEAVE = 2


class Stopped(SystemExit):
    """A signal ended the run. The exit code is 128 + its number.

    Attributes:
        told: what became of the run, in a line.
    """

    def __init__(self, number: int, told: str):
        super().__init__(128 + number)
        self.told = f"stopped by signal {number} {told}"


class StopSignal:
    """Which signal asked for a stop, and whether there is something to save before.

    Attributes:
        number: of the first signal; 0 as long as there is none.
        nothing_to_save: whether a signal ends the run where it is. If not, it only sets `number`,
            for the run to save its state and leave.
    """

    def __init__(self) -> None:
        self.number = 0
        self.nothing_to_save = False

    def as_it_is(self) -> Stopped:
        return Stopped(self.number, "with nothing new to save")


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Listens for SIGNALS meanwhile, and tells of the one that ended the run.

    A signal that is ignored stays so, as SIGHUP under nohup; but not SIGINT, which shells have
    ignored by whatever they start in the background. A second SIGINT acts as if this were not
    here. In a thread that is not the main one nothing is heard: signals go to the main one.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: FrameType | None) -> None:
        stop.number = stop.number or number
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT])
        if stop.nothing_to_save:
            if jax.distributed.is_initialized():  # whose other processes Python would wait for
                end_process(stop.as_it_is())
            raise stop.as_it_is()

    found = {number: signal.getsignal(number) for number in SIGNALS}
    previous = {
        number: old
        for number, old in found.items()
        if old is not None and (old is not signal.SIG_IGN or number == signal.SIGINT)
    }
    try:
        for number in previous:
            signal.signal(number, handler)
        with heard_in_foreign_code(stop, previous):
            yield stop
    except Stopped as e:
        log.info("%s", e.told)
        raise
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextlib.contextmanager
def heard_in_foreign_code(stop: StopSignal, numbers: Collection[int]) -> Iterator[None]:
    """Ends the process where there is nothing to save and the main thread does not leave itself.

    Python's handlers wait until the main thread is back from code that is not Python's, such as
    XLA's compiler, which may take minutes. Another thread does not.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    left = threading.Event()

    def listen() -> None:
        while heard := os.read(reader, 1):
            if heard[0] not in numbers or not stop.nothing_to_save or hasattr(sys, "ps1"):
                continue  # ps1: in a notebook, which would be lost with the process
            if not left.wait(SECONDS_TO_LEAVE) and stop.nothing_to_save:
                stop.number = stop.number or heard[0]
                end_process(stop.as_it_is())

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        os.close(writer)  # by which the thread ends
        thread.join()
        os.close(reader)


def end_process(stopped: Stopped, *, is_told: bool = False) -> NoReturn:
    """Exits without waiting for anything: computations under way, other processes, threads.

    Args:
        is_told: whether its line has been written.
    """
    if not is_told:
        log.info("%s", stopped.told)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(stopped.code or 0))
