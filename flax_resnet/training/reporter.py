"""What the host does about each call of the devices: waits for it, logs, evaluates and saves."""

import math
import sys
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flax_resnet.config import Experiment, TrainConfig
from flax_resnet.data.source import Split
from flax_resnet.errors import TrainingError
from flax_resnet.optim import make_schedule
from flax_resnet.parallel.processes import Agreement, is_first, on_first
from flax_resnet.step import Metrics, TrainState
from flax_resnet.training.checkpoint import Checkpoints
from flax_resnet.training.evaluation import Evaluation
from flax_resnet.training.metrics_log import MetricsLog, Row
from flax_resnet.training.signals import StopSignal


class Done(NamedTuple):
    """A call that was handed to the devices, and what is to be done about it."""

    step: int  # that it ends at
    size: int  # in steps
    metrics: Metrics  # since the last line of the log
    to_save: TrainState | None  # a copy
    to_evaluate: TrainState | None  # gone as soon as the next call is made
    stopped_by: int = 0  # the signal that ends the run here
    ended_at: Future[float] | None = None  # seconds of `time.perf_counter`; None: when one looks


class Interrupted(Exception):
    """A signal ends the run in the middle of an evaluation."""

    def __init__(self, number: int):
        self.number = number


def is_due(step: int, period: int, settings: TrainConfig) -> bool:
    return step % period == 0 or step == settings.steps


class Reporter:
    """Waits for the devices, then logs, evaluates and saves what they have done.

    Args:
        examples: of every split; resident ones on the devices.
        step: that the run goes on from.
    """

    def __init__(
        self,
        config: Experiment,
        examples: Mapping[str, Split],
        evaluate: Evaluation,
        metrics_log: MetricsLog,
        bar: tqdm,
        checkpoints: Checkpoints,
        stop: StopSignal,
        step: int,
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
        self.stop = stop
        self.agreed = Agreement(evaluate.mesh, delay=1)
        self.clock = Clock(metrics_log.rows, step)

    def __call__(self, done: Done) -> int:
        """The signal that ends the run here, its state being saved; 0 if none does.

        Raises:
            TrainingError: the loss is not finite; nothing is saved then.
        """
        now = wait_for(done.metrics) if done.ended_at is None else done.ended_at.result()
        self.stop.nothing_to_save = False
        self.clock.tick(done.size * self.settings.batch_size, now)
        self.bar.update(done.size)
        if is_due(done.step, self.settings.log_every, self.settings):
            self.log_training(done)
        error, stopped_by, state = None, done.stopped_by, done.to_save
        if done.to_evaluate is not None and not stopped_by:
            try:
                error = self.log_evaluation(done.step, done.to_evaluate, self.examples)
            except Interrupted as e:
                stopped_by, state = e.number, done.to_evaluate
        if state is not None:
            self.checkpoints.save(state, error)
        return stopped_by

    def log_evaluation(self, step: int, state: TrainState, splits: Collection[str]) -> float | None:
        """Evaluates every split but the training images; returns the error of the last one.

        Raises:
            Interrupted: a signal came, in whatever process.
        """
        error = None
        for split in splits:
            arrays = state.params, state.batch_stats, self.examples[split]
            row = self.evaluate(*arrays, self.after_batch).mean()
            error = row["error"]
            self.metrics_log.append({"step": step, "split": split} | row)
        self.clock.restart_lap(time.perf_counter())
        return error

    def after_batch(self, total: Metrics) -> None:
        """Raises Interrupted if the run is to end before the evaluation does."""
        if jax.process_count() == 1:  # several hear at the end of each batch, which all share
            loss: Any = total.loss  # jax.Array does not declare is_ready
            while not loss.is_ready() and not self.stop.number:
                time.sleep(0.001)
        if number := self.agreed(self.stop.number):
            raise Interrupted(number)

    def make_up(self, state: TrainState, evaluate_every: int) -> None:
        """Logs what is missing of the state that a run goes on from.

        A signal may have cut its evaluation off, or the log may be lost; what the summary is made
        of must be there at the last step.

        Args:
            evaluate_every: of the run so far.
        """
        step, is_last = int(state.step), int(state.step) == self.settings.steps
        known = {row["split"] for row in self.metrics_log.rows if row["step"] == step}
        known = set(on_first(lambda: sorted(known)))
        if is_last and "train" not in known and int(state.metrics.examples):
            self.append_training(step, state.metrics.mean())
        if is_last or step % evaluate_every == 0:
            missing = [split for split in self.examples if split not in known]
            self.log_evaluation(step, state, missing)

    def log_training(self, done: Done) -> None:
        row = done.metrics.mean()
        if not math.isfinite(row["loss"]):
            raise TrainingError(f"the loss is {row['loss']} at step {done.step}")
        row |= self.clock.lap()
        self.append_training(done.step, row)
        rate = f", {row['images_per_second']:.0f} images/s" if "images_per_second" in row else ""
        self.bar.set_postfix_str(
            f"loss {row['loss']:.3f}, error {100 * row['error']:.1f} %{rate}", refresh=False
        )

    def append_training(self, step: int, row: Row) -> None:
        row["learning_rate"] = float(np.asarray(self.learning_rate(step - 1)))
        self.metrics_log.append({"step": step, "split": "train"} | row)


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


def wait_for(metrics: Metrics) -> float:
    """The time at which the devices have computed them."""
    jax.block_until_ready(metrics)
    return time.perf_counter()


class Clock:
    """Wall time of a run, over all its sessions, and the rate of training steps alone.

    All times are those of `time.perf_counter`.

    Args:
        rows: of the log so far, whose last one tells how long earlier sessions took.
        step: that the run goes on from. If the log tells of none, its time is not known.
    """

    def __init__(self, rows: list[Row], step: int):
        before = [row["seconds"] for row in rows if "seconds" in row]
        self.is_known = bool(before) or not step
        self.now = time.perf_counter()
        self.start = self.now - max(before, default=0)
        self.compiled = False
        self.restart_lap(self.now)

    def restart_lap(self, now: float) -> None:
        self.lap_start, self.lap_images = now, 0

    def tick(self, images: int, now: float) -> None:
        """Counts a call that has ended. The rate starts after a session's first: it compiles."""
        self.now = now
        self.lap_images += images
        if not self.compiled:
            self.compiled = True
            self.restart_lap(now)

    def lap(self) -> Row:
        """Seconds from the run's beginning to the end of the last call.

        And images per second since the last lap, if known.
        """
        row = {"seconds": self.now - self.start} if self.is_known else {}
        if self.lap_images:
            row["images_per_second"] = self.lap_images / (self.now - self.lap_start)
        self.restart_lap(self.now)
        return row
