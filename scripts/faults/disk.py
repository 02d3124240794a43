"""The disk is full, at one place or another of what a run writes."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from faults.fault import Result, Unavailable
from faults.run import Run, begun, finish, newest, uninterrupted


def full_disk(runs: int, at: Path) -> Iterator[Result]:
    """Leaves less room than a run goes on to need, more each time; then makes room."""
    with tmpfs(at / "disk", 1 << 20):
        pass  # Unavailable at once, not after two runs
    uninterrupted(at)
    source = begun(at).workdir
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
