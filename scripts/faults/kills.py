"""A run is killed, told to stop, or started twice in one work directory."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
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
    rows,
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
    """Sends each signal at each moment; the figure is the time it took to save and leave."""
    uninterrupted(at)
    rng = random.Random(1)
    for i in range(runs):
        # Of four, each signal and each moment once; of sixteen, each with each.
        number = SIGNALS[i % len(SIGNALS)]
        moment = list(MOMENTS)[(i + i // len(SIGNALS)) % len(MOMENTS)]
        run = MOMENTS[moment](at, at / f"stopped{i}", rng)
        start = time.monotonic()
        code = run.send(number)
        seconds, saved = time.monotonic() - start, newest(run.workdir)
        told = f"at step {saved}, which is saved" if saved else "with nothing new to save"
        held = code == 128 + number and seconds < 10 and last_row(run.workdir) <= saved
        held = held and run.said(f"stopped by signal {number.value} {told}")
        held = held and was_there(moment, run, saved)
        end = finish(at, run.workdir) if held else Result(False, str(run))
        yield Result(end.held, f"{number.name} {moment}, step {saved} {end.detail}", seconds)


def between_steps(at: Path, directory: Path, rng: random.Random) -> Run:
    run = Run(at, directory)
    run.until_logged(rng.randrange(2, STEPS - 8, LOG_EVERY))
    return run


def evaluating(at: Path, directory: Path, rng: random.Random) -> Run:
    """Image by image, which takes a while: the first evaluation, or the last."""
    step = rng.choice((STEPS // 2, STEPS))
    run = Run(at, directory, {"train.eval_batch_size": 1})
    run.until_logged(step)  # of the training images
    return run


def compiling(at: Path, directory: Path, rng: random.Random) -> Run:
    """With no cache of compiled programs. The events' file is opened just before."""
    run = Run(at, directory, JAX_ENABLE_COMPILATION_CACHE="false")
    run.until(lambda directory: any(directory.glob("tensorboard/events*")))
    run.until(lambda _: False, rng.uniform(0, 2))
    return run


def loading(at: Path, directory: Path, rng: random.Random) -> Run:
    """Before the images are there, and with them config.json."""
    run = Run(at, directory)
    run.until(lambda directory: (directory / ".lock").exists())
    return run


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
MOMENTS: dict[str, Callable[[Path, Path, random.Random], Run]] = {
    "between steps": between_steps,
    "in an evaluation": evaluating,
    "in the compiler": compiling,
    "before the data": loading,
}


def was_there(moment: str, run: Run, saved: int) -> bool:
    """Whether the signal came when it should: else something else was tried."""
    begun = (run.workdir / "config.json").exists()
    if moment == "in an evaluation":
        tests = [row["step"] for row in rows(run.workdir) if row["split"] == "test"]
        return saved in (STEPS // 2, STEPS) and saved not in tests
    if moment == "in the compiler":
        return begun and not saved
    return begun == (moment == "between steps") and (saved > 0) == begun


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
