"""Files of a run are damaged by chance: those of a checkpoint, and JAX's compiled programs."""

import contextlib
import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from faults.fault import Result
from faults.run import Run, numbers, steps_saved, uninterrupted
from flax_resnet.errors import CheckpointError
from flax_resnet.step import init
from flax_resnet.training import checkpoint, workdir


def flip(runs: int, at: Path) -> Iterator[Result]:
    """Flips one bit of the newest checkpoint; the figures count the harmless ones."""
    yield from damage(runs, finished(at), "flip")


def truncate(runs: int, at: Path) -> Iterator[Result]:
    """Cuts one file of the newest checkpoint at a random byte; the figures are as for `flip`."""
    yield from damage(runs, finished(at), "truncate")


def finished(at: Path) -> Path:
    """A finished run of our own to damage."""
    directory = at / "damaged"
    if not directory.exists():
        shutil.copytree(uninterrupted(at), directory)
    return directory


def damage(runs: int, directory: Path, kind: Literal["flip", "truncate"]) -> Iterator[Result]:
    """Damages the newest of several checkpoints, a random file each time, and repairs it again.

    It holds if loading gives the numbers of the newest checkpoint or, with a warning, those of the
    one before.

    Args:
        directory: work directory.
    """
    *_, before, last = steps_saved(directory)
    like = init(workdir.read_config(directory))[1]
    good = checkpoint.digest(checkpoint.load_state(directory, like, last))
    fallback = checkpoint.digest(checkpoint.load_state(directory, like, before))
    files = [path for path in (directory / "checkpoints" / str(last)).rglob("*") if path.is_file()]
    files = [path for path in sorted(files) if path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    rng = random.Random(2)
    for i in range(runs):
        # One time any byte is as likely as another, the next time any file: some are small.
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
        except CheckpointError as e:  # no wrong numbers, but the run cannot go on
            yield Result(False, f"{name}: {e}")
        finally:
            path.write_bytes(whole)


@contextlib.contextmanager
def caught_warnings() -> Iterator[list[str]]:
    """What the library logs meanwhile."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("flax_resnet")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def compilation_cache(runs: int, at: Path) -> Iterator[Result]:
    """Damages every entry of JAX's cache of compiled programs, in one of three ways in turn."""
    uninterrupted(at)
    source = at / "compiled"
    Run(at, at / "compiling", JAX_COMPILATION_CACHE_DIR=str(source)).wait()
    rng = random.Random(4)
    for i in range(runs):
        cache = at / f"compiled{i}"
        shutil.copytree(source, cache)
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
