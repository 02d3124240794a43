"""What the host does about each call of the devices: waits for it, logs, evaluates and saves."""

import math
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flax_resnet.config import Experiment, TrainConfig
from flax_resnet.data.examples import Examples
from flax_resnet.errors import TrainingError
from flax_resnet.optim import make_schedule
from flax_resnet.parallel.processes import is_first
from flax_resnet.step import Metrics, TrainState
from flax_resnet.training.checkpoint import Checkpoints
from flax_resnet.training.evaluation import Evaluate
from flax_resnet.training.metrics_log import MetricsLog, Row


class Done(NamedTuple):
    """A call that was handed to the devices, and what is to be done about it."""

    step: int  # that it ends at
    size: int  # in steps
    metrics: Metrics  # since the last line of the log
    to_save: TrainState | None  # a copy
    to_evaluate: TrainState | None  # gone as soon as the next call is made
    stopped_by: int = 0  # the signal that ends the run here


def is_due(step: int, period: int, settings: TrainConfig) -> bool:
    return step % period == 0 or step == settings.steps


class Reporter:
    """Waits for the devices, then logs, evaluates and saves what they have done.

    Args:
        examples: of every split, on the devices.
    """

    def __init__(
        self,
        config: Experiment,
        examples: Mapping[str, Examples],
        evaluate: Evaluate,
        metrics_log: MetricsLog,
        bar: tqdm,
        checkpoints: Checkpoints,
    ):
        self.settings = config.train
        self.learning_rate = make_schedule(config.optim, config.train.steps)
        # The validation split, if any, comes last, and so decides which checkpoint is the best.
        self.examples = {
            name: examples[name] for name in ("test", "validation") if name in examples
        }
        self.evaluate = evaluate
        self.metrics_log = metrics_log
        self.bar = bar
        self.checkpoints = checkpoints
        self.clock = Clock(metrics_log.rows)

    def __call__(self, done: Done) -> None:
        """Raises TrainingError if the loss is not finite; nothing is saved then."""
        jax.block_until_ready(done.metrics)
        self.clock.tick(done.size * self.settings.batch_size)
        self.bar.update(done.size)
        if is_due(done.step, self.settings.log_every, self.settings):
            self.log_training(done)
        error = None
        if done.to_evaluate is not None:
            error = self.log_evaluation(done.step, done.to_evaluate)
        if done.to_save is not None:
            self.checkpoints.save(done.to_save, error)

    def log_evaluation(self, step: int, state: TrainState) -> float | None:
        """Evaluates every split but the training images; returns the error of the last one."""
        error = None
        for split, examples in self.examples.items():
            row = self.evaluate(state.params, state.batch_stats, examples).mean()
            error = row["error"]
            self.metrics_log.append({"step": step, "split": split} | row)
        self.clock.restart_lap()
        return error

    def log_training(self, done: Done) -> None:
        row = done.metrics.mean()
        if not math.isfinite(row["loss"]):
            raise TrainingError(f"the loss is {row['loss']} at step {done.step}")
        row["learning_rate"] = float(np.asarray(self.learning_rate(done.step - 1)))
        row |= self.clock.lap()
        self.metrics_log.append({"step": done.step, "split": "train"} | row)
        rate = f", {row['images_per_second']:.0f} images/s" if "images_per_second" in row else ""
        self.bar.set_postfix_str(
            f"loss {row['loss']:.3f}, error {100 * row['error']:.1f} %{rate}", refresh=False
        )


def progress_bar(config: Experiment, step: int) -> tqdm:
    return tqdm(
        total=config.train.steps,
        initial=step,
        desc=config.model.label,
        unit="step",
        disable=not is_first(),
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file needs fewer lines
    )


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
        """Counts a call. The first one of a session compiles, so the rate starts after it."""
        self.lap_images += images
        if not self.compiled:
            self.compiled = True
            self.restart_lap()

    def lap(self) -> Row:
        """Seconds since the run began, and images per second since the last lap, if known."""
        now = time.perf_counter()
        row = {"seconds": now - self.start}
        if self.lap_images:
            row["images_per_second"] = self.lap_images / (now - self.lap_start)
        self.restart_lap()
        return row
