"""The numbers themselves: a loss that is not finite, and a run that changes its devices."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from faults.fault import Result
from faults.run import STEPS, Run, newest, rows
from flax_resnet.step import init
from flax_resnet.training import checkpoint, workdir


def not_finite(runs: int, at: Path) -> Iterator[Result]:
    """Sets the learning rate to 1e30 at some step; the figure is how many steps late it stops."""
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
    """Goes on with 1, 2, 4, 8, 1 devices in float64; the figure is the relative difference."""
    settings = {"model.dtype": "float64", "train.log_every": 1, "train.checkpoint_every": 100}
    alone = Run(at, at / "one_device", settings, JAX_NUM_CPU_DEVICES="1")
    assert alone.wait() == 0, alone
    like = init(workdir.read_config(alone.workdir))[1]
    theirs = jax.tree.leaves(checkpoint.load_state(alone.workdir, like)[1:4])
    for i in range(runs):
        directory, held, run = at / f"devices{i}", True, alone
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
