"""The faults that a run must survive, each really done: one row of the table a function.

A row takes how many times to do it and a directory to do it in, and yields a Result for each time.
`scripts/torture.py` runs them all in full, `test_survival.py` a few of each: they live here, beside
the tests, because both need them.

Runs are `scripts/train_flax.py` in processes of their own: ResNet-8 on the digits, 24 steps of 16.
They share a cache of compiled programs, or compiling would take most of the time.
"""

import contextlib
import functools
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_resnet.data import cifar10
from flax_resnet.errors import CheckpointError, DatasetError, UserError
from flax_resnet.step import init
from flax_resnet.training import checkpoint, workdir
from flax_resnet.weights import files

ROOT = Path(__file__).resolve().parent.parent
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


class Result(NamedTuple):
    """What came of doing it once."""

    held: bool
    detail: str = ""
    figure: float | None = None  # the unit is the row's


class Row(NamedTuple):
    """A line of the table."""

    fault: str
    promise: str
    function: Callable[[int, Path], Iterator[Result]]
    full: int  # how many times a full run does it
    unit: str = ""  # of the figures
    shown: Callable[[list[float]], float] = max  # which of them


class Unavailable(Exception):
    """This machine lacks what the row needs."""


class Run:
    """`scripts/train_flax.py` at work in a process of its own.

    Args:
        at: the rows' directory, which has the caches and the logs.
        workdir: the run's.
        settings: `--config.NAME=VALUE`, beside SETTINGS.
        env: environment variables.
    """

    def __init__(self, at: Path, workdir: Path, settings: dict[str, Any] | None = None, **env: str):
        self.workdir = workdir
        (at / "logs").mkdir(parents=True, exist_ok=True)
        self.log = at / "logs" / f"{workdir.name}.{time.monotonic_ns()}"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    str(ROOT / "scripts/train_flax.py"),
                    f"--config={ROOT / 'configs/quickstart.py'}",
                    f"--workdir={workdir}",
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
        """Waits until it is true of the directory; False if the run ended before, or the time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if true(self.workdir):
                return True
            time.sleep(0.002)
        return False

    def until_logged(self, step: int) -> bool:
        return self.until(lambda directory: last_row(directory) >= step)

    def send(self, number: signal.Signals) -> int:
        """Exit code after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(60)

    @property
    def lines(self) -> list[str]:
        """What it said, less the progress bar."""
        text = self.log.read_text(errors="replace").replace("\r", "\n")
        text = re.sub(r"[^\n]*(?:step/s|s/step)[^\n\]]*\]", "", text)
        return [line for line in text.split("\n") if line.strip()]

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    @property
    def is_refused(self) -> bool:
        """Ended with exit code 2 and one line of explanation, no traceback."""
        told = [line for line in self.lines if line.startswith("error: ")]
        return self.process.returncode == 2 and len(told) == 1 and not self.said("Traceback")

    def __str__(self) -> str:
        return f"exit {self.process.returncode}: {' | '.join(self.lines[-3:])[-300:]}"


def environment(at: Path) -> dict[str, str]:
    """With caches of the rows' own, and errors as a user sees them."""
    inherited = {k: v for k, v in os.environ.items() if k != "FLAX_RESNET_TRACEBACK"}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(at / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(at / "cache" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@functools.cache
def uninterrupted(at: Path) -> Path:
    """The run that all others must equal, made once."""
    run = Run(at, at / "uninterrupted")
    if run.wait() != 0:
        raise AssertionError(str(run))
    return run.workdir


@functools.cache
def begun(at: Path) -> Path:
    """A run of which no process is alive, with two checkpoints and some way to go."""
    run = Run(at, at / "begun")
    run.until(lambda directory: len(steps_saved(directory)) >= 2)
    run.send(signal.SIGTERM)
    (run.workdir / "summary.json").unlink(missing_ok=True)
    return run.workdir


def rows(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def last_row(directory: Path) -> int:
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
    """Digest of the last state, and all of the log that is not a time."""
    meta = directory / "checkpoints" / str(STEPS) / "meta" / "metadata"
    keys = ("step", "split", "loss", "error", "learning_rate")
    log = [tuple(row.get(key) for key in keys) for row in rows(directory)]
    return json.loads(meta.read_text())["digest"], log


def finish(at: Path, directory: Path) -> Result:
    """Runs it to its end, which must equal the uninterrupted run's to the bit."""
    step = newest(directory)
    run = Run(at, directory)
    code = run.wait()
    went_on = run.said(f"going on from step {step}") or not step or run.said("nothing to do")
    if code != 0 or not went_on:
        return Result(False, f"it should go on from step {step}: {run}")
    if numbers(directory) != numbers(uninterrupted(at)):
        return Result(False, "it ends with other numbers")
    return Result(True)


def kill(runs: int, at: Path) -> Iterator[Result]:
    """The same run is killed again and again until it is at its end, then the next one."""
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
    """SIGTERM and SIGINT in turn; the figure is the time it took to save and leave."""
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


def full_disk(runs: int, at: Path) -> Iterator[Result]:
    """A disk with room for ever more of what a run goes on to write; then room is made."""
    uninterrupted(at)
    source = begun(at)
    files = [path for path in source.rglob("*") if path.is_file()]
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in files)
    for i in range(runs):
        room = int(used * (i + 0.5) / runs)  # what is written takes about twice that
        with tmpfs(at / "disk", 4 * used + (8 << 20)) as disk:
            directory = disk / "run"
            shutil.copytree(source, directory)
            before = newest(directory)
            with (disk / "ballast").open("wb") as ballast:
                ballast.write(bytes(max(0, shutil.disk_usage(disk).free - room)))
            run = Run(at, directory)
            run.wait(120)
            held, detail = run.is_refused, f"{room} bytes left: {run}"
            (disk / "ballast").unlink()
            if held:
                kept = newest(directory)
                end = finish(at, directory)
                held, detail = end.held and kept >= before, f"{detail}; then {end}"
        yield Result(held, detail)


@contextlib.contextmanager
def tmpfs(path: Path, size: int) -> Iterator[Path]:
    """A file system in memory, of `size` bytes. Raises Unavailable where none may be mounted."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "flax-resnet", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except OSError as e:
        raise Unavailable(f"no small file system can be mounted: {e}") from e
    if mounted.returncode != 0:
        raise Unavailable(f"no small file system can be mounted: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def flip(runs: int, at: Path) -> Iterator[Result]:
    """One bit of one file of the newest checkpoint; the figures tell the harmless ones."""
    yield from damage(runs, at, "flip")


def truncate(runs: int, at: Path) -> Iterator[Result]:
    """One file of the newest checkpoint, cut at a random byte."""
    yield from damage(runs, at, "truncate")


def damage(runs: int, at: Path, kind: str) -> Iterator[Result]:
    """No numbers but those of the newest checkpoint or, with a warning, those of the one before."""
    directory = at / "damaged"
    if not directory.exists():
        shutil.copytree(uninterrupted(at), directory)
    *_, before, last = steps_saved(directory)
    like = init(workdir.read_config(directory))[1]
    good = checkpoint.digest(checkpoint.load_state(directory, like, last))
    fallback = checkpoint.digest(checkpoint.load_state(directory, like, before))
    files = [path for path in (directory / "checkpoints" / str(last)).rglob("*") if path.is_file()]
    files = [path for path in sorted(files) if path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    rng = random.Random(2)
    for i in range(runs):
        # Half of them anywhere in the bytes, half in any file, as some are small.
        path = rng.choices(files, sizes)[0] if i % 2 else rng.choice(files)
        whole = path.read_bytes()
        position = rng.randrange(len(whole))
        harmed = bytearray(whole)
        harmed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(whole[:position] if kind == "truncate" else harmed)
        name = f"{path.relative_to(directory / 'checkpoints' / str(last))}, byte {position}"
        try:
            with caught_warnings() as warnings:
                found = checkpoint.digest(checkpoint.load_state(directory, like))
            detected = found == fallback and any(f"checkpoints/{last}" in w for w in warnings)
            yield Result(detected or found == good, name, float(found == good))
        except CheckpointError as e:  # refused as a whole: never wrong, but the run cannot go on
            yield Result(False, f"{name}: {e}")
        finally:
            path.write_bytes(whole)


@contextlib.contextmanager
def caught_warnings() -> Iterator[list[str]]:
    import logging

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("flax_resnet")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def not_finite(runs: int, at: Path) -> Iterator[Result]:
    """The rate jumps to 1e30 at some step; the figure is how many steps later the run stopped."""
    rng = random.Random(3)
    for i in range(runs):
        step = rng.randrange(4, STEPS - 6)
        settings = {"optim.peak_lr": 1e30, "optim.warmup_steps": step, "optim.warmup_lr": 0.01}
        settings["train.log_every"] = 4
        run = Run(at, at / f"not_finite{i}", settings | {"optim.boundaries": "(30,)"})
        run.wait()
        named = [
            int(w) for w in " ".join(run.lines[-1:]).replace(":", " ").split() if w.isdecimal()
        ]
        detail = f"rate 1e30 from step {step}: {run}"
        held = run.is_refused and bool(named) and newest(run.workdir) > 0
        if held:
            like = init(workdir.read_config(run.workdir))[1]
            state = checkpoint.load_state(run.workdir, like, newest(run.workdir))
            held = all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))
        # The step after the jump makes the weights huge, the next one's loss is not finite.
        late = float(named[0] - (step + 2)) if named else float(STEPS)
        yield Result(held and 0 <= late <= 4, detail, late)


def devices(runs: int, at: Path) -> Iterator[Result]:
    """1 -> 2 -> 4 -> 8 -> 1 devices, float64; the figure is the largest relative difference."""
    settings = {"model.dtype": "float64", "train.log_every": 1, "train.checkpoint_every": 100}
    alone = Run(at, at / "one_device", settings, JAX_NUM_CPU_DEVICES="1")
    assert alone.wait() == 0, alone
    like = init(workdir.read_config(alone.workdir))[1]
    theirs = jax.tree.leaves(checkpoint.load_state(alone.workdir, like)[1:4])
    for i in range(runs):
        directory, held = at / f"devices{i}", True
        for number, until in zip((1, 2, 4, 8, 1), (4, 8, 12, 16, STEPS), strict=True):
            run = Run(at, directory, settings, JAX_NUM_CPU_DEVICES=str(number))
            if until < STEPS:
                run.until_logged(until)
                held &= run.send(signal.SIGTERM) == 128 + signal.SIGTERM
            else:
                held &= run.wait() == 0
        if not held:
            yield Result(False, str(run))
            continue
        ours = jax.tree.leaves(checkpoint.load_state(directory, like)[1:4])
        pairs = zip(ours, theirs, strict=True)
        far = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)) for a, b in pairs)
        losses = [[row["loss"] for row in rows(w)] for w in (directory, alone.workdir)]
        held = np.allclose(*losses, rtol=np.finfo(np.float32).eps, atol=0)
        yield Result(held and far <= 1e-12, "1 -> 2 -> 4 -> 8 -> 1", far)


def two_runs(runs: int, at: Path) -> Iterator[Result]:
    """A second run in the same directory is refused; killing the first leaves no obstacle."""
    uninterrupted(at)
    directory = at / "shared"
    for i in range(runs):
        first = Run(at, directory)
        first.until(is_locked)
        os.kill(first.process.pid, signal.SIGSTOP)  # or it would be over before the second came
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


def dataset(runs: int, at: Path) -> Iterator[Result]:
    """A prepared dataset or its cache, harmed in every way in turn, and four first runs at once."""
    import pytest

    from parity_tests import test_cifar10 as small

    at = at / "dataset"
    harms = [small.shorten, Path.unlink, small.flip_middle, small.lose_record, "cache", "partial"]
    for i in range(runs):
        root, harm = at / f"{i}", harms[i % len(harms)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
            right = small.put_archive(root, patch, seed=i)
            if i % 10 == 9:
                yield four_at_once(root, right)
                continue
            cifar10.load(str(root))
            name = harm if isinstance(harm, str) else harm.__name__
            if harm == "cache":
                small.flip(small.cache_entry(), random.Random(i).randrange(-1000, 1000))
            elif harm == "partial":
                shards = sorted(small.dataset_path(root).glob("*array_record*"))
                shards[i % len(shards)].write_bytes(b"")
            else:
                harm(small.dataset_path(root) / "cifar10-step.array_record-00000-of-00001")
            with contextlib.suppress(DatasetError):
                got = cifar10.load(str(root))
                small.assert_same(got, right)
                yield Result(True, f"{name}: prepared again")
                continue
            yield Result(False, f"{name}: not prepared again")


def four_at_once(root: Path, right: dict[str, cifar10.Examples]) -> Result:
    import hashlib

    from parity_tests import test_cifar10 as small

    processes = [small.start_process(root) for _ in range(4)]
    outputs = [process.communicate("\n", timeout=120)[0] for process in processes]
    data = b"".join(array.tobytes() for e in right.values() for array in e)
    sha = hashlib.sha256(data).hexdigest()
    held = all(output.split() == ["ready", sha] for output in outputs)
    fetched = (root / "calls").read_text().split().count("_fetch")
    return Result(held and fetched == 1, f"four at once, prepared {fetched} times")


def hostile(runs: int, at: Path) -> Iterator[Result]:
    """Files that are made to do harm; the figure is by how many MB the largest memory use grew."""
    source, canary = begun(at), at / "canary"
    config = workdir.read_config(source)
    like = init(config)[1]
    step = newest(source)
    for i in range(runs):
        make = HOSTILE[i % len(HOSTILE)]
        directory = at / "hostile"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(source, directory)
        outside = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
        path = make(directory, step, canary)
        before = reset_peak()
        try:
            if path.is_dir():
                workdir.read_config(path)
                checkpoint.load_state(path, like, step)
            else:
                files.read(path)
            refused, said = False, "loaded"
        except Exception as e:  # of the scripts' users only these two kinds are told in one line
            refused, said = isinstance(e, UserError | OSError), f"{type(e).__name__}: {e}"
        grown = megabytes("VmHWM") - before
        intact = outside == {path: path.stat().st_mtime_ns for path in source.rglob("*")}
        held = refused and not canary.exists() and intact and grown < 500
        yield Result(held, f"{make.__name__}: {said}", grown)


def reset_peak() -> float:
    """Begins to measure the largest memory use anew; returns what is used now, in MB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return megabytes("VmRSS")


def megabytes(kind: str, pid: int | str = "self") -> float:
    """What Linux knows of a process: VmRSS, the memory it uses, or VmHWM, the most it has used.

    Raises OSError or StopIteration once the process is over.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 1024


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def pickle_that_runs_code(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.pt"
    path.write_bytes(pickle.dumps({"state_dict": Payload(canary)}, protocol=2))
    return path


def archive_that_runs_code(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"w": Payload(canary)}, protocol=2))
        archive.writestr("x/version", "3\n")
    return path


def archive_that_unpacks_elsewhere(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"w": 1}, protocol=2))
        archive.writestr(f"x/../../../../../..{canary}", "")
        archive.writestr(str(canary), "")
    return path


def archive_bomb(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.th"
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("x/data.pkl", "w") as file:
        for _ in range(1000):
            file.write(bytes(1 << 20))
    return path


def tensors_that_claim_terabytes(directory: Path, step: int, canary: Path) -> Path:
    import torch

    path = directory / "x.pt"
    torch.save({"conv1.weight": torch.zeros(1).expand(10**6, 10**6)}, path)
    return path


def safetensors_that_claim_terabytes(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.safetensors"
    entry = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    header = json.dumps({"conv1.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    return path


def safetensors_with_an_endless_header(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    return path


def config_of_a_giant(directory: Path, step: int, canary: Path) -> Path:
    return with_config(directory, lambda config: config["model"].update(depth=6 * 10**9 + 2))


def config_of_a_billion_classes(directory: Path, step: int, canary: Path) -> Path:
    return with_config(directory, lambda config: config["model"].update(num_classes=10**9))


def config_of_wrong_types(directory: Path, step: int, canary: Path) -> Path:
    return with_config(directory, lambda config: config.update(model=["depth"]))


def config_nested_too_deep(directory: Path, step: int, canary: Path) -> Path:
    (directory / "config.json").write_text("[" * 10**6)
    return directory


def with_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return directory


def meta_nested_too_deep(directory: Path, step: int, canary: Path) -> Path:
    (directory / "checkpoints" / str(step) / "meta" / "metadata").write_text("[" * 10**6)
    return directory


def meta_of_another_kind(directory: Path, step: int, canary: Path) -> Path:
    (directory / "checkpoints" / str(step) / "meta" / "metadata").write_text("[1]")
    return directory


def tree_metadata_of_huge_shapes(directory: Path, step: int, canary: Path) -> Path:
    paths = [p for p in (directory / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()]
    for path in paths:
        with contextlib.suppress(ValueError):
            text = json.dumps(enlarged(json.loads(path.read_text())))
            path.write_text(text)
    # Shapes in there alone do no harm; without the digest, nothing that it holds is believed.
    (directory / "checkpoints" / str(step) / "meta" / "metadata").write_text('{"digest": "0"}')
    return directory


def enlarged(tree: Any) -> Any:
    """All lists of numbers, such as shapes, made huge."""
    if isinstance(tree, dict):
        return {key: enlarged(value) for key, value in tree.items()}
    if isinstance(tree, list):
        is_shape = tree and all(isinstance(x, int) for x in tree)
        return [10**9 for _ in tree] if is_shape else [enlarged(x) for x in tree]
    return tree


def arrays_of_huge_shapes(directory: Path, step: int, canary: Path) -> Path:
    """Real ones, of zeros: a few MB on the disk, 8 GB in memory."""
    path = directory / "checkpoints" / str(step)
    config = workdir.read_config(directory)
    state = init(config)[1]
    state.params["fc"]["kernel"] = np.zeros((64, 2 * 10**6), np.float32)  # 0.5 GB
    shutil.rmtree(path)
    with checkpoint.Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(state._replace(step=np.int32(step)), None)
    return directory


def handler_by_name(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    tree = json.loads(path.read_text())
    tree["item_handlers"] = {"state": "os.system", "meta": f"os.system('touch {canary}')"}
    path.write_text(json.dumps(tree))
    (directory / "checkpoints" / str(step) / "meta" / "metadata").write_text('{"digest": "0"}')
    return directory


def step_that_is_a_link(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "checkpoints" / str(step)
    path.rename(directory / "elsewhere")
    path.symlink_to(directory / "elsewhere")
    return directory


def file_that_is_a_link(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "checkpoints" / str(step) / "meta" / "metadata"
    path.unlink()
    path.symlink_to("/etc/passwd")
    return directory


def temporary_that_is_a_link(directory: Path, step: int, canary: Path) -> Path:
    """Orbax clears away what a killed run left: it must not clear away what a link names."""
    (directory / "checkpoints" / "99.orbax-checkpoint-tmp").symlink_to(directory.parent / "begun")
    return directory


HOSTILE = [
    pickle_that_runs_code,
    archive_that_runs_code,
    archive_that_unpacks_elsewhere,
    archive_bomb,
    tensors_that_claim_terabytes,
    safetensors_that_claim_terabytes,
    safetensors_with_an_endless_header,
    config_of_a_giant,
    config_of_a_billion_classes,
    config_of_wrong_types,
    config_nested_too_deep,
    meta_nested_too_deep,
    meta_of_another_kind,
    tree_metadata_of_huge_shapes,
    arrays_of_huge_shapes,
    handler_by_name,
    step_that_is_a_link,
    file_that_is_a_link,
    temporary_that_is_a_link,
]


def compilation_cache(runs: int, at: Path) -> Iterator[Result]:
    """Every entry of JAX's cache of compiled programs is cut short, flipped or emptied in turn."""
    uninterrupted(at)
    rng = random.Random(4)
    for i in range(runs):
        cache = at / f"compiled{i}"
        shutil.copytree(at / "cache" / "compiled", cache)
        kind = ("flipped", "cut short", "emptied")[i % 3]
        entries = [path for path in sorted(cache.rglob("*")) if path.is_file()]
        for path in entries:
            data = bytearray(path.read_bytes())
            position = rng.randrange(max(len(data), 1))
            if kind == "flipped" and data:
                data[position] ^= 1 << rng.randrange(8)
            path.write_bytes({"flipped": data, "cut short": data[:position]}.get(kind, b""))
        run = Run(at, at / f"cached{i}", JAX_COMPILATION_CACHE_DIR=str(cache))
        code = run.wait()
        held = code == 0 and numbers(run.workdir) == numbers(uninterrupted(at))
        yield Result(held, f"{len(entries)} entries {kind}: {'' if held else run}")


def long_run(runs: int, at: Path, steps: int = 2000) -> Iterator[Result]:
    """Thousands of steps; the figure is the growth of memory from its third quarter."""
    settings = {
        "train.steps": steps,
        "train.log_every": 10,
        "train.evaluate_every": steps // 20,
        "train.checkpoint_every": steps // 20,
    }
    for i in range(runs):
        # Without the cache of programs, whose hits are no compilations: none would be counted.
        logs = {"JAX_LOG_COMPILES": "1", "JAX_LOGGING_LEVEL": "WARNING"}
        logs |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        run = Run(at, at / f"long{i}", settings, **logs)
        memory: dict[int, float] = {}
        compiled: dict[int, int] = {}
        while run.process.poll() is None:
            step = last_row(run.workdir)
            if step not in memory:
                with contextlib.suppress(OSError, StopIteration):  # over meanwhile
                    memory[step] = megabytes("VmRSS", run.process.pid)
                    compiled[step] = sum("Finished XLA compilation" in x for x in run.lines)
            time.sleep(0.05)
        if run.process.returncode != 0:
            yield Result(False, str(run))
            continue
        late = [step for step in memory if step >= steps // 4]
        # The allocator needs some ten checkpoints to find its size; then nothing may grow.
        first = np.median([memory[step] for step in late if steps // 2 <= step < 3 * steps // 4])
        last = np.median([memory[step] for step in late if step >= 3 * steps // 4])
        grown = 100 * float(last / first - 1)
        programs = compiled[max(late)] - compiled[min(late)]
        detail = f"{steps} steps, {first:.1f} to {last:.1f} MB, {programs} compilations"
        yield Result(grown < 1 and programs == 0 and compiled[max(late)] > 0, detail, grown)


TABLE = {
    "kill": Row(
        "SIGKILL at a random moment, a third inside a save",
        "resumes from the newest checkpoint; all numbers equal the uninterrupted run's, to the bit",
        kill,
        100,
    ),
    "stop": Row(
        "SIGTERM, SIGINT",
        "saves, exits with 128 + signal within 10 s, no step lost",
        stop,
        20,
        "s to stop",
    ),
    "full_disk": Row(
        "disk full at varying offsets",
        "one-line error, exit code 2; the previous checkpoint loads and the run goes on",
        full_disk,
        20,
    ),
    "flip": Row(
        "flipped bit in a checkpoint",
        "detected, falls back and says so, unless no number changed",
        flip,
        1000,
        "changed no number",
        sum,
    ),
    "truncate": Row(
        "truncated checkpoint file",
        "detected, falls back and says so, unless no number changed",
        truncate,
        100,
        "changed no number",
        sum,
    ),
    "not_finite": Row(
        "loss not finite",
        "stops within one log interval (4 steps), names the step; the last checkpoint is finite",
        not_finite,
        10,
        "steps late",
    ),
    "devices": Row(
        "resumed on 1, 2, 4, 8, 1 devices",
        "same examples; equal within float64 rounding (1e-12)",
        devices,
        1,
        "relative difference",
    ),
    "two_runs": Row(
        "two runs in one work directory",
        "the second is refused; a killed run's lock is no obstacle",
        two_runs,
        10,
    ),
    "dataset": Row(
        "damaged dataset or cache; four first runs at once",
        "prepared again, once, never trained on",
        dataset,
        20,
    ),
    "hostile": Row(
        "hostile checkpoint or weights",
        "refused in one line, nothing executed, memory bounded",
        hostile,
        len(HOSTILE),
        "MB of memory",
    ),
    "compilation_cache": Row(
        "damaged compilation cache", "the same numbers", compilation_cache, 10
    ),
    "long_run": Row(
        "2,000 steps",
        "memory flat within 1 % in the second half, nothing compiled after the first quarter",
        long_run,
        1,
        "% more memory",
    ),
}
