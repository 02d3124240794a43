"""A run of thousands of steps."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from faults.fault import Result
from faults.memory import megabytes
from faults.run import Run, last_row


def long_run(runs: int, at: Path, steps: int = 2000) -> Iterator[Result]:
    """Trains for long; the figure is by how much memory grew from the third quarter to the last."""
    settings = {
        "train.steps": steps,
        "train.log_every": 10,
        "train.evaluate_every": steps // 20,
        "train.checkpoint_every": steps // 20,
    }
    for i in range(runs):
        # Without the cache of compiled programs: with it there would be nothing to count.
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
