"""Does to training what it must survive: `python scripts/torture.py [--runs N] [--rows a,b]`.

Prints the table row by row, and exits with 0 only if every row holds. Without `--runs` each row is
done as often as its full run says, 41 minutes in all on one busy core; with it, N times
(`devices` and `long_run` once). The rows are those of faults/table.py.
"""

import datetime
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
from absl import flags

from faults.fault import Fault, Result, Unavailable
from faults.table import TABLE
from flax_resnet import cli
from flax_resnet.errors import ConfigError, TrainingError

RUNS = flags.DEFINE_integer("runs", None, "how many times each fault is done", lower_bound=1)
ROWS = flags.DEFINE_list("rows", list(TABLE), f"which of {', '.join(TABLE)}")
OUT = cli.define_path("out", None, "where the table is written, such as results/reliability.md")
KEEP = cli.define_path("keep", None, "where the runs are left to be looked at; else removed")
VERBOSE = flags.DEFINE_bool("verbose", False, "tell what was done each time, not failures alone")

HEADER = "| fault | what must happen | runs | held | worst | minutes |\n|---|---|---|---|---|---|"


def main() -> None:
    unknown = [name for name in ROWS.value if name not in TABLE]
    if unknown:
        raise ConfigError(f"--rows must be of {', '.join(TABLE)}, got {unknown[0]}")
    jax.config.update("jax_enable_x64", True)
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory(prefix="flax-resnet-torture-") as temporary:
        at = (KEEP.value or Path(temporary)).absolute()
        lines, held = [], True
        for name in ROWS.value:
            line, row_held = torment(name, TABLE[name], at)
            print(line, flush=True)
            lines.append(line)
            held &= row_held
    if OUT.value:
        OUT.value.parent.mkdir(parents=True, exist_ok=True)
        OUT.value.write_text("\n".join([*preface(), HEADER, *lines]) + "\n")
    if not held:
        raise TrainingError("a row does not hold")


def torment(name: str, fault: Fault, at: Path) -> tuple[str, bool]:
    """Does a fault; returns its line of the table, and whether it held every time."""
    start = time.monotonic()
    runs = fault.full if RUNS.value is None or fault.full == 1 else RUNS.value
    results: list[Result] = []
    worst = ""
    try:
        for result in fault.inflict(runs, at):
            results.append(result)
            if not result.held or VERBOSE.value:
                print(f"{name} {len(results)}: {result}", file=sys.stderr, flush=True)
    except Unavailable as e:
        worst = f"not done: {e}"
    figures = [result.figure for result in results if result.figure is not None]
    if figures:
        worst = f"{fault.shown(figures):.3g} {fault.unit}"
    minutes = (time.monotonic() - start) / 60
    held = sum(result.held for result in results)
    cells = [fault.description, fault.promise, str(runs), str(held), worst, f"{minutes:.1f}"]
    return f"| {' | '.join(cells)} |", held == runs


def preface() -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "orbax-checkpoint"))
    return [
        "# What training survives",
        "",
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} CPU cores, Python {platform.python_version()}, "
        f"{versions}.",
        "",
        f"`{' '.join(['python', *sys.argv])}`",
        "",
    ]


if __name__ == "__main__":
    cli.run(main)
