"""`fit`: the library's only clock, log and loop."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from tqdm import tqdm

from flax_resnet.config import Experiment, TrainConfig
from flax_resnet.data import order, pixels, source
from flax_resnet.data.examples import Examples
from flax_resnet.data.order import Draw
from flax_resnet.data.pixels import Normalization
from flax_resnet.errors import TrainingError
from flax_resnet.json_files import read_json, write_json
from flax_resnet.nn.cpu import keep_memory
from flax_resnet.optim import make_schedule
from flax_resnet.parallel import sharding
from flax_resnet.parallel.processes import Agreement, is_first, on_first
from flax_resnet.resnet import param_dtype
from flax_resnet.step import Metrics, Program, TrainState, init, train_step
from flax_resnet.training.checkpoint import Checkpoints
from flax_resnet.training.curves import plot_curves
from flax_resnet.training.evaluation import make_evaluate
from flax_resnet.training.metrics_log import MetricsLog, Row, SilentLog
from flax_resnet.training.signals import stop_signal
from flax_resnet.training.workdir import claimed

log = logging.getLogger(__name__)


class Done(NamedTuple):
    """What the host is to report about a step, when the device has got there."""

    step: int
    size: int  # steps since the last report
    metrics: Metrics  # since the last line of the log
    state: TrainState | None  # a copy, to be saved


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
    keep_memory()
    mesh = sharding.data_mesh()
    sharding.check_batch_size(mesh, "train.batch_size", config.train.batch_size)
    with claimed(workdir, config):
        finished = workdir / "summary.json"
        summary = on_first(lambda: read_json(finished) if finished.exists() else None)
        if summary is not None:
            log.info("%s: finished at step %d, nothing to do", workdir, summary["steps"])
        else:
            splits = source.load(config.data)
            state, rows = train(config, workdir, mesh, splits)

            def report() -> dict[str, Any]:
                summary = summarize(config, state, rows)
                summary |= {f"{name}_examples": len(split.label) for name, split in splits.items()}
                summary["cpu_cores"] = os.cpu_count()
                plot_curves(rows, workdir / "curves.png", config.model.label)
                write_json(finished, summary)
                return summary

            summary = on_first(report)
        log.info("test error %.2f %%, curves in %s", 100 * summary["test_error"], workdir)
        return summary


def train(
    config: Experiment, workdir: Path, mesh: Mesh, splits: dict[str, Examples]
) -> tuple[TrainState, list[Row]]:
    """Runs the steps that are left; returns the last state and all rows of the log.

    The host is one call behind the devices: while they run the next steps it logs and saves what
    the last ones left, so that they never wait for it. Only an evaluation holds the next steps up;
    and where host and device are the same processor, which could only lose by it (the memory of
    two steps at once), the host is not behind.
    """
    settings = config.train
    constants = pixels.make_normalization(config.data.preprocess, splits["train"].image)
    program, state = init(config, mesh.size)
    train_call = compile_steps(config, program, constants, mesh)
    evaluate = make_evaluate(config.model, program, constants, mesh, settings.eval_batch_size)
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    state, examples = sharding.replicate(mesh, (state, splits))
    is_cpu = jax.default_backend() == "cpu"
    steps_per_call = settings.steps_per_call or (1 if is_cpu else settings.log_every)
    agreed = Agreement(mesh, delay=1)  # a call, by which the host is behind the devices

    with stop_signal() as received, Checkpoints(workdir / "checkpoints") as checkpoints:
        state = checkpoints.restore(state) or state
        step = int(state.step)
        if step:
            log.info("%s: going on from step %d", workdir, step)
        log_class = MetricsLog if is_first() else SilentLog
        with log_class(workdir, step) as metrics_log, progress_bar(config, step) as bar:
            report = Reporter(config, splits, metrics_log, bar, checkpoints)
            previous: Done | None = None
            stop = 0
            while step < settings.steps and not stop:
                size = min(steps_per_call, steps_to_next_report(step, settings))
                drawn = draw_steps(config, step, size, len(splits["train"].label))
                drawn = sharding.split_batch(mesh, drawn, config.parallel, axis=1)
                state, metrics = train_call(state, examples["train"], drawn)
                step += size
                stop = agreed(received[0] if received else 0)
                is_saved = bool(stop) or is_due(step, settings.checkpoint_every, settings)
                if previous is not None:
                    report(previous)
                previous = Done(step, size, metrics, copy(state) if is_saved else None)
                if is_due(step, settings.evaluate_every, settings):
                    arrays = state.params, state.batch_stats
                    report(
                        previous, lambda split, arrays=arrays: evaluate(*arrays, examples[split])
                    )
                    previous = None
                elif is_cpu:
                    report(previous)
                    previous = None
            if previous is not None:
                report(previous)
            if step < settings.steps:
                log.info("stopped by signal %d at step %d, which is saved", stop, step)
                sys.exit(128 + stop)
        return state, metrics_log.rows


def compile_steps(
    config: Experiment, program: Program, constants: Normalization, mesh: Mesh
) -> Callable[[TrainState, Examples, Draw], tuple[TrainState, Metrics]]:
    """`call(state, examples, drawn)`: as many steps as `drawn` has, by a scan.

    The metrics are those since the last line of the log.
    """
    dtype = param_dtype(config.model)

    def step(state: TrainState, examples: Examples, drawn: Draw) -> TrainState:
        batch = pixels.training_batch(examples, drawn, constants, config.data.pad, dtype)
        metrics = state.metrics.zero_if(state.step % config.train.log_every == 0)
        return train_step(program, state._replace(metrics=metrics), batch)[0]

    def steps(state: TrainState, examples: Examples, drawn: Draw) -> tuple[TrainState, Metrics]:
        if len(drawn.indices) == 1:
            state = step(state, examples, jax.tree.map(lambda x: x[0], drawn))
        else:
            state, _ = lax.scan(lambda s, d: (step(s, examples, d), None), state, drawn)
        return state, state.metrics

    return sharding.compile_step(steps, mesh, config.parallel)


def draw_steps(config: Experiment, step: int, size: int, num_examples: int) -> Draw:
    """What the next `size` steps see, stacked."""
    draws = [
        order.draw(config.data, config.seed, s, config.train.batch_size, num_examples)
        for s in range(step, step + size)
    ]
    return Draw(*(np.stack(parts) for parts in zip(*draws, strict=True)))


def steps_to_next_report(step: int, settings: TrainConfig) -> int:
    periods = settings.log_every, settings.evaluate_every, settings.checkpoint_every
    return min(settings.steps - step, *(period - step % period for period in periods))


def is_due(step: int, period: int, settings: TrainConfig) -> bool:
    return step % period == 0 or step == settings.steps


class Reporter:
    """Waits for the devices, then logs, evaluates and saves what they have done."""

    def __init__(
        self,
        config: Experiment,
        splits: Collection[str],
        metrics_log: MetricsLog,
        bar: tqdm,
        checkpoints: Checkpoints,
    ):
        self.settings = config.train
        self.learning_rate = make_schedule(config.optim)
        # The validation split, if any, comes last, and so decides which checkpoint is the best.
        self.splits = [split for split in ("test", "validation") if split in splits]
        self.metrics_log = metrics_log
        self.bar = bar
        self.checkpoints = checkpoints
        self.clock = Clock(metrics_log.rows)

    def __call__(self, done: Done, evaluate: Callable[[str], Metrics] | None = None) -> None:
        """Reports one call.

        Args:
            evaluate: gives a split's metrics, if it is time for them.

        Raises:
            TrainingError: the loss is not finite; nothing is saved.
        """
        jax.block_until_ready(done.metrics)
        self.clock.tick(done.size * self.settings.batch_size)
        self.bar.update(done.size)
        if is_due(done.step, self.settings.log_every, self.settings):
            self.log_training(done)
        error = None
        if evaluate is not None:
            for split in self.splits:
                row = evaluate(split).mean()
                error = row["error"]
                self.metrics_log.append({"step": done.step, "split": split} | row)
            self.clock.restart_lap()
        if done.state is not None:
            self.checkpoints.save(done.state, error)

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


def summarize(config: Experiment, state: TrainState, rows: list[Row]) -> dict[str, Any]:
    """What a finished run came to; errors are those of the last step, never of the best one."""
    results = {
        f"{row['split']}_{name}": row[name]
        for row in rows
        for name in ("error", "loss")
        if row["step"] == config.train.steps
    }
    train_rows = [row for row in rows if row["split"] == "train"]
    rates = [row["images_per_second"] for row in train_rows if "images_per_second" in row]
    return results | {
        "steps": config.train.steps,
        "wall_seconds": train_rows[-1]["seconds"],
        "images_per_second": median(rates) if rates else None,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
        "config": config.to_dict(),
    }
