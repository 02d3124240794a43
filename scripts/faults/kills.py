"""A run is killed, told to stop, or started twice in one work directory."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from faults.fault import Result
from faults.run import (
    LOG_EVERY,
    STEPS,
    Run,
    finish,
    is_saving,
    last_row,
    newest,
    uninterrupted,
)


def kill(runs: int, at: Path) -> Iterator[Result]:
    """Kills the same run again and again until it is at its end, then the next one."""
    uninterrupted(at)
    rng = random.Random(0)
    directory, resumes_at = at / "killed0", 0
    for i in range(runs):
        run, step = Run(at, directory), last_row(directory)
        if i % 3 == 0:
            moment = "inside a save" if run.until(is_saving) else "at the end"
        elif i % 3 == 1:
            step = min(step + LOG_EVERY * rng.randint(1, 5), STEPS - LOG_EVERY)
            moment = f"after step {step}"
            run.until_logged(step)
        else:
            moment = f"after {(seconds := rng.uniform(0, 8)):.2f} s"
            run.until(lambda _: False, seconds)
        run.process.kill()
        code = run.wait()
        held = code in (0, -signal.SIGKILL)
        held &= not run.said("going on") or run.said(f"going on from step {resumes_at}")
        detail = f"{moment}, newest checkpoint {newest(directory)}"
        if not held:
            detail += f", expected {resumes_at}: {run}"
        elif i == runs - 1 or last_row(directory) >= STEPS - 3 or code == 0:
            end = finish(at, directory)
            held, detail = end.held, f"{detail}; finished {end.detail}"
            directory = at / f"killed{i + 1}"
        resumes_at = newest(directory)
        yield Result(held, detail)


def stop(runs: int, at: Path) -> Iterator[Result]:
    """Sends SIGTERM and SIGINT in turn; the figure is the time it took to save and leave."""
    uninterrupted(at)
    rng = random.Random(1)
    for i in range(runs):
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        run, step = Run(at, at / f"stopped{i}"), rng.randrange(2, STEPS - 8, LOG_EVERY)
        run.until_logged(step)
        start = time.monotonic()
        code = run.send(number)
        seconds, saved = time.monotonic() - start, newest(run.workdir)
        held = code == 128 + number and seconds < 10 and last_row(run.workdir) <= saved
        held = held and run.said(f"stopped by signal {number} at step {saved}, which is saved")
        end = finish(at, run.workdir) if held else Result(False, str(run))
        detail = f"{signal.Signals(number).name} at step {saved} {end.detail}"
        yield Result(end.held, detail, seconds)


def two_runs(runs: int, at: Path) -> Iterator[Result]:
    """Starts a second run in the same directory; every other time the first is then killed."""
    uninterrupted(at)
    directory = at / "shared"
    for i in range(runs):
        first = Run(at, directory)
        first.until(is_locked)
        os.kill(first.process.pid, signal.SIGSTOP)  # else it would end before the second came
        second = Run(at, directory)
        second.wait()
        os.kill(first.process.pid, signal.SIGCONT)
        held = second.is_refused and second.said("is in use by another run")
        if i % 2 == 0:
            first.send(signal.SIGKILL)
        end = finish(at, directory) if i % 2 == 0 else Result(first.wait() == 0, str(first))
        yield Result(held and end.held, f"second: {second}; first: {end.detail}")
        shutil.rmtree(directory)


def is_locked(directory: Path) -> bool:
    """Whether a run holds the lock, from the moment it has written whose it is."""
    return (directory / "config.json").exists()
