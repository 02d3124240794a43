"""A run in a process of its own, what its work directory shows, and the runs that faults share.

Runs are `scripts/train_flax.py`: ResNet-8 on the digits, 24 steps of 16. They share a cache of
compiled programs, or compiling would take most of the time.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.fault import Result
from flax_resnet.places import Url

ROOT = Path(__file__).resolve().parents[2]


STEPS = 24
LOG_EVERY = 2
SETTINGS = {
    "train.steps": STEPS,
    "train.batch_size": 16,
    "train.log_every": LOG_EVERY,
    "train.evaluate_every": 12,
    "train.eval_batch_size": 360,
    "train.checkpoint_every": 3,
}


class Run:
    """`scripts/train_flax.py` at work in a process of its own.

    Args:
        at: directory of all runs, which has their caches and logs.
        workdir: this run's work directory.
        settings: `--config.NAME=VALUE`, in addition to SETTINGS.
        url: a bucket's, of which `workdir` is then the local copy.
        env: environment variables, in addition to `environment`.
    """

    def __init__(
        self,
        at: Path,
        workdir: Path,
        settings: dict[str, Any] | None = None,
        url: Url | None = None,
        **env: str,
    ):
        self.workdir = workdir
        places = [f"--workdir={url}", f"--local={workdir}"] if url else [f"--workdir={workdir}"]
        (at / "logs").mkdir(parents=True, exist_ok=True)
        self.log = at / "logs" / f"{workdir.name}.{time.monotonic_ns()}"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "scripts/train_flax.py"),
                    f"--config={ROOT / 'configs/quickstart.py'}",
                    *places,
                    *(f"--config.{k}={v}" for k, v in (SETTINGS | (settings or {})).items()),
                ],
                stdout=output,
                stderr=output,
                env=environment(at) | env,
            )

    def wait(self, seconds: float = 300) -> int:
        """Exit code; a run that takes longer is killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def until(self, true: Callable[[Path], Any], seconds: float = 120) -> bool:
        """Waits until `true` of the work directory; False if the run or the time ended before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if true(self.workdir):
                return True
            time.sleep(0.002)
        return False

    def until_logged(self, step: int) -> bool:
        return self.until(lambda directory: last_row(directory) >= step)

    def send(self, number: signal.Signals) -> int:
        """Sends a signal and returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(60)

    @property
    def lines(self) -> list[str]:
        """What the run printed, without its progress bar."""
        text = self.log.read_text(errors="replace").replace("\r", "\n")
        text = re.sub(r"[^\n]*(?:step/s|s/step)[^\n\]]*\]", "", text)
        return [line for line in text.split("\n") if line.strip()]

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    @property
    def is_refused(self) -> bool:
        """Whether it ended with exit code 2 and one line of explanation, without a traceback."""
        told = [line for line in self.lines if line.startswith("error: ")]
        return self.process.returncode == 2 and len(told) == 1 and not self.said("Traceback")

    def __str__(self) -> str:
        return f"exit {self.process.returncode}: {' | '.join(self.lines[-3:])[-300:]}"


def environment(at: Path) -> dict[str, str]:
    """Of a run: this process's, with its data's cache under `at`, and errors as a user sees them.

    Compiled programs are kept under `at` too, unless JAX was told of another directory.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "FLAX_RESNET_TRACEBACK"}
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(at / "cache" / "compiled")
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(at / "cache"),
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@functools.cache
def uninterrupted(at: Path) -> Path:
    """Work directory of the run that all others must equal; it is made once."""
    run = Run(at, at / "uninterrupted")
    if run.wait() != 0:
        raise AssertionError(str(run))
    return run.workdir


@functools.cache
def begun(at: Path) -> Run:
    """A run that was told to stop, with two checkpoints and some way to go; it is made once."""
    run = Run(at, at / "begun")
    run.until(lambda directory: len(steps_saved(directory)) >= 2)
    run.send(signal.SIGTERM)
    (run.workdir / "summary.json").unlink(missing_ok=True)
    return run


def finish(at: Path, directory: Path) -> Result:
    """Runs it on to its end; all numbers must equal the uninterrupted run's, to the bit."""
    step = newest(directory)
    run = Run(at, directory)
    code = run.wait()
    went_on = run.said(f"going on from step {step}") or not step or run.said("nothing to do")
    if code != 0 or not went_on:
        return Result(False, f"it should go on from step {step}: {run}")
    if numbers(directory) != numbers(uninterrupted(at)):
        return Result(False, "it ends with other numbers")
    return Result(True)


def rows(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of the log: its last may be half written."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def last_row(directory: Path) -> int:
    """Step of the log's last row, 0 if it has none."""
    return max((row["step"] for row in rows(directory)), default=0)


def steps_saved(directory: Path) -> list[int]:
    names = [path.name for path in (directory / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def newest(directory: Path) -> int:
    """Step of the newest checkpoint, 0 if there is none."""
    return max(steps_saved(directory), default=0)


def is_saving(directory: Path) -> bool:
    """Whether Orbax is writing a checkpoint, which has a temporary name until it is whole."""
    return any("tmp" in path.name for path in (directory / "checkpoints").glob("*"))


def numbers(directory: Path) -> tuple[str, list[tuple[Any, ...]]]:
    """Of a finished run: the digest of its last state, and all of its log but the times."""
    meta = directory / "checkpoints" / str(STEPS) / "meta" / "metadata"
    keys = ("step", "split", "loss", "error", "learning_rate")
    log = [tuple(row.get(key) for key in keys) for row in rows(directory)]
    return json.loads(meta.read_text())["digest"], log
