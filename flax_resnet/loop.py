"""`fit`: the library's only clock, log and loop."""

import contextlib
import json
import logging
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from flax_resnet import data, sharding
from flax_resnet.checkpoint import Checkpoints
from flax_resnet.cifar10 import Examples
from flax_resnet.config import Experiment, Shortcut
from flax_resnet.data import Draw
from flax_resnet.errors import TrainingError
from flax_resnet.evaluation import make_evaluate
from flax_resnet.optim import make_schedule
from flax_resnet.report import MetricsLog, Row, plot_curves
from flax_resnet.resnet import param_dtype
from flax_resnet.train import Metrics, TrainState, init, train_step
from flax_resnet.workdir import claimed, write_json

log = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 2  # enough to keep the device busy, few enough to stop soon when told to


def fit(config: Experiment, workdir: Path) -> dict[str, Any]:
    """Trains `config` to its last step in `workdir`, going on from the newest checkpoint there.

    Returns:
        The summary, also written to summary.json. A run that is finished does nothing.

    Raises:
        ConfigError: a setting breaks a rule, or `workdir` holds a run of another config.
        DatasetError: the dataset is missing or damaged.
        CheckpointError: `workdir` is in use, or none of its checkpoints is whole.
        TrainingError: the loss is not finite.
        SystemExit: after SIGTERM or SIGINT, with code 128 + signal, once the state is saved.
    """
    config.validate()
    mesh = sharding.data_mesh()
    sharding.check_batch_size(mesh, "train.batch_size", config.train.batch_size)
    with claimed(workdir, config):
        finished = workdir / "summary.json"
        if finished.exists():
            summary = json.loads(finished.read_text())
            log.info("%s: finished at step %d, nothing to do", workdir, summary["steps"])
        else:
            splits = data.load(config.data)
            state, rows = train(config, workdir, mesh, splits)
            summary = summarize(config, state, rows)
            plot_curves(rows, workdir / "curves.png", title(config))
            write_json(finished, summary)
        log.info("test error %.2f %%, curves in %s", 100 * summary["test_error"], workdir)
        return summary


def train(
    config: Experiment, workdir: Path, mesh: Mesh, splits: dict[str, Examples]
) -> tuple[TrainState, list[Row]]:
    """Runs the steps that are left; returns the last state and all rows of the log."""
    settings = config.train
    constants = data.make_normalization(config.data.preprocess, splits["train"].image)
    dtype = param_dtype(config.model)
    program, state = init(config, mesh.size)

    def step_fn(state: TrainState, examples: Examples, drawn: Draw) -> tuple[TrainState, Metrics]:
        batch = data.training_batch(examples, drawn, constants, config.data.pad, dtype)
        return train_step(program, state, batch)

    train_call = sharding.compile_step(step_fn, mesh, config.parallel)
    evaluate = make_evaluate(config.model, program, constants, mesh, settings.eval_batch_size)
    learning_rate = make_schedule(config.optim)
    state, examples = sharding.replicate(mesh, (state, splits))
    in_flight: deque[Metrics] = deque()

    with stop_signal() as stop, Checkpoints(workdir / "checkpoints") as checkpoints:
        state = checkpoints.restore(state) or state
        step = int(state.step)
        if step:
            log.info("%s: going on from step %d", workdir, step)
        with MetricsLog(workdir, step) as metrics_log, progress_bar(config, step) as bar:
            clock = Clock(metrics_log.rows)
            while step < settings.steps:
                drawn = data.draw(
                    config.data, config.seed, step, settings.batch_size, len(splits["train"].label)
                )
                drawn = sharding.split_batch(mesh, drawn, config.parallel)
                state, metrics = train_call(state, examples["train"], drawn)
                step += 1
                in_flight.append(metrics)
                if len(in_flight) > STEPS_IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft())
                clock.tick(settings.batch_size)
                bar.update()

                last = step == settings.steps
                error = None
                if last or step % settings.log_every == 0:
                    row = state.metrics.mean()
                    if not math.isfinite(row["loss"]):
                        raise TrainingError(f"the loss is {row['loss']} at step {step}")
                    state = state._replace(metrics=sharding.replicate(mesh, Metrics.zeros()))
                    row |= {
                        "learning_rate": float(np.asarray(learning_rate(step - 1)))
                    } | clock.lap()
                    metrics_log.append({"step": step, "split": "train"} | row)
                    bar.set_postfix_str(
                        f"loss {row['loss']:.3f}, error {100 * row['error']:.1f} %, "
                        f"{row['images_per_second']:.0f} images/s",
                        refresh=False,
                    )
                if last or step % settings.evaluate_every == 0:
                    for split in ("test", "validation"):  # validation, if any, decides the best
                        if split in splits:
                            row = evaluate(state.params, state.batch_stats, examples[split])
                            error = row["error"]
                            metrics_log.append({"step": step, "split": split} | row)
                    clock.restart_lap()
                if last or stop or step % settings.checkpoint_every == 0:
                    checkpoints.save(state, error)
                    clock.restart_lap()
                if stop and not last:
                    log.info("stopped by signal %d at step %d, which is saved", stop[0], step)
                    sys.exit(128 + stop[0])
        return state, metrics_log.rows


def progress_bar(config: Experiment, step: int) -> tqdm:
    return tqdm(
        total=config.train.steps,
        initial=step,
        desc=title(config),
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file needs fewer lines
    )


def title(config: Experiment) -> str:
    """Such as "ResNet-20 A" or "plain-20"."""
    model = config.model
    if model.shortcut is Shortcut.PLAIN:
        return f"plain-{model.depth}"
    return f"ResNet-{model.depth} {model.shortcut.value}"


class Clock:
    """Wall time of a run, over all its sessions, and the rate of training steps alone.

    Args:
        rows: of the log so far, whose last one tells how long earlier sessions took.
    """

    def __init__(self, rows: list[Row]):
        self.start = time.perf_counter() - max((row.get("seconds", 0) for row in rows), default=0)
        self.compiled = False
        self.restart_lap()

    def restart_lap(self) -> None:
        self.lap_start, self.lap_images = time.perf_counter(), 0

    def tick(self, images: int) -> None:
        """Counts a step. The first one of a session compiles, so the rate starts after it."""
        self.lap_images += images
        if not self.compiled:
            self.compiled = True
            self.restart_lap()

    def lap(self) -> Row:
        """Seconds since the run began, and images per second since the last lap."""
        now = time.perf_counter()
        rate = self.lap_images / (now - self.lap_start)
        self.restart_lap()
        return {"seconds": now - self.start, "images_per_second": rate}


@contextlib.contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM or SIGINT arrives, whose number it then holds.

    A second signal acts at once, as if this were not here.
    """
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)

    def handler(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield received
    finally:
        for number in numbers:
            signal.signal(number, previous[number])


def summarize(config: Experiment, state: TrainState, rows: list[Row]) -> dict[str, Any]:
    """What a finished run came to; errors are those of the last step, never of the best one."""
    results = {
        f"{row['split']}_{name}": row[name]
        for row in rows
        for name in ("error", "loss")
        if row["step"] == config.train.steps
    }
    train_rows = [row for row in rows if row["split"] == "train"]
    return results | {
        "steps": config.train.steps,
        "wall_seconds": train_rows[-1]["seconds"],
        "images_per_second": median(row["images_per_second"] for row in train_rows),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
        "config": config.to_dict(),
    }
