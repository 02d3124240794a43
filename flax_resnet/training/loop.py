"""`fit`: trains a run to its last step, whatever interrupts it."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from flax_resnet.config import Experiment, TrainConfig
from flax_resnet.data import order, pixels, source
from flax_resnet.data.examples import Examples
from flax_resnet.data.order import Draw
from flax_resnet.data.pixels import Normalization
from flax_resnet.json_files import read_json, write_json
from flax_resnet.nn.cpu import keep_memory
from flax_resnet.parallel import sharding
from flax_resnet.parallel.processes import Agreement, is_first, on_first
from flax_resnet.resnet import param_dtype
from flax_resnet.step import Metrics, Program, TrainState, init, train_step
from flax_resnet.training.checkpoint import Checkpoints
from flax_resnet.training.curves import plot_curves
from flax_resnet.training.evaluation import make_evaluate
from flax_resnet.training.metrics_log import MetricsLog, Row, SilentLog
from flax_resnet.training.reporter import Done, Reporter, is_due, progress_bar
from flax_resnet.training.signals import stop_signal
from flax_resnet.training.workdir import claimed, facts_of, keep_data_facts

log = logging.getLogger(__name__)


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
    source.check_classes(config.data, config.model.num_classes)
    keep_memory()
    mesh = sharding.data_mesh()
    check_batch_size(config.train, mesh)
    with claimed(workdir, config):
        finished = workdir / "summary.json"
        summary = on_first(lambda: read_json(finished) if finished.exists() else None)
        if summary is not None:
            log.info("%s: finished at step %d, nothing to do", workdir, summary["steps"])
        else:
            splits = source.load(config.data)
            facts = facts_of(config.data, splits)
            on_first(lambda: keep_data_facts(workdir, facts))
            parameters, rows = train(config, workdir, mesh, splits, facts.normalization)

            def report() -> dict[str, Any]:
                summary = summarize(config, parameters, rows)
                summary |= {f"{name}_examples": size for name, size in facts.examples.items()}
                summary["cpu_cores"] = os.cpu_count()
                plot_curves(rows, workdir / "curves.png", config.model.label)
                write_json(finished, summary)
                return summary

            summary = on_first(report)
        log.info("test error %.2f %%, curves in %s", 100 * summary["test_error"], workdir)
        return summary


def train(
    config: Experiment,
    workdir: Path,
    mesh: Mesh,
    splits: dict[str, Examples],
    constants: Normalization,
) -> tuple[int, list[Row]]:
    """Runs the steps that are left; returns the number of parameters and all rows of the log."""
    program, state = init(config, mesh.size)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    state, examples = sharding.replicate(mesh, (state, splits))
    evaluate = make_evaluate(config.model, program, constants, mesh, config.train.eval_batch_size)
    log_class = MetricsLog if is_first() else SilentLog
    with stop_signal() as received, Checkpoints(workdir / "checkpoints") as checkpoints:
        state = checkpoints.restore(state) or state
        step = int(state.step)
        if step:
            log.info("%s: going on from step %d", workdir, step)
        with log_class(workdir, step) as metrics_log, progress_bar(config, step) as bar:
            report = Reporter(config, examples, evaluate, metrics_log, bar, checkpoints)
            call = compile_steps(config, program, constants, mesh)
            done: Done | None = None
            calls = run_steps(config, mesh, call, state, examples["train"], received)
            del state  # its memory is given to the first call
            for done in delayed(calls, jax.default_backend() != "cpu"):
                report(done)
            if done is not None and done.stopped_by:
                log.info(
                    "stopped by signal %d at step %d, which is saved", done.stopped_by, done.step
                )
                sys.exit(128 + done.stopped_by)
        return parameters, metrics_log.rows


def run_steps(
    config: Experiment,
    mesh: Mesh,
    call: Callable[[TrainState, Examples, Draw], tuple[TrainState, Metrics]],
    state: TrainState,
    examples: Examples,
    received: list[int],
) -> Iterator[Done]:
    """Hands call after call to the devices, and tells of each at once: it may still be running.

    Args:
        call: of `compile_steps`.
        received: signals that ask for a stop, as they come.
    """
    settings = config.train
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    agreed = Agreement(mesh, delay=1)
    on_cpu = jax.default_backend() == "cpu"
    steps_per_call = settings.steps_per_call or (1 if on_cpu else settings.log_every)
    step, stop = int(state.step), 0
    while step < settings.steps and not stop:
        if step % settings.log_every == 0:
            state = state._replace(metrics=sharding.replicate(mesh, Metrics.zeros()))
        size = min(steps_per_call, steps_to_next_report(step, settings))
        drawn = draw_steps(config, step, size, len(examples.label))
        drawn = sharding.split_batch(mesh, drawn, config.parallel, axis=1)
        state, metrics = call(state, examples, drawn)
        step += size
        stop = agreed(received[0] if received else 0)
        is_saved = bool(stop) or is_due(step, settings.checkpoint_every, settings)
        is_evaluated = is_due(step, settings.evaluate_every, settings)
        yield Done(
            step,
            size,
            metrics,
            to_save=copy(state) if is_saved else None,
            to_evaluate=state if is_evaluated else None,
            stopped_by=stop if step < settings.steps else 0,
        )


def delayed(calls: Iterator[Done], delay: bool) -> Iterator[Done]:
    """The same calls, each told when the next is under way, so that no device waits for the host.

    An evaluation holds the next call up: its state is there only until then. Without `delay`
    nothing waits: where host and device are the same processor it could only lose by two steps'
    memory at once.
    """
    previous: Done | None = None
    for done in calls:
        if previous is not None:
            yield previous
        previous = done
        if not delay or done.to_evaluate is not None:
            yield done
            previous = None
    if previous is not None:
        yield previous


def compile_steps(
    config: Experiment, program: Program, constants: Normalization, mesh: Mesh
) -> Callable[[TrainState, Examples, Draw], tuple[TrainState, Metrics]]:
    """`call(state, examples, drawn)`: as many steps as `drawn` has, by a scan.

    The metrics of its steps are added to those of the state, and returned.
    """
    dtype = param_dtype(config.model)

    def step(state: TrainState, examples: Examples, drawn: Draw) -> TrainState:
        batch = pixels.training_batch(examples, drawn, constants, config.data.pad, dtype)
        return train_step(program, state, batch)[0]

    def steps(state: TrainState, examples: Examples, drawn: Draw) -> tuple[TrainState, Metrics]:
        if len(drawn.indices) == 1:
            state = step(state, examples, jax.tree.map(lambda x: x[0], drawn))
        else:
            state, _ = lax.scan(lambda s, d: (step(s, examples, d), None), state, drawn)
        return state, state.metrics

    return sharding.compile_step(steps, mesh, config.parallel)


def check_batch_size(settings: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError unless every device gets the same number of examples of a micro-batch."""
    name, size = "train.batch_size", settings.batch_size
    if settings.accumulate > 1:
        name, size = f"{name} / train.accumulate", size // settings.accumulate
    sharding.check_batch_size(mesh, name, size)


def draw_steps(config: Experiment, step: int, size: int, num_examples: int) -> Draw:
    """What the next `size` steps see, stacked."""
    draws = [
        order.draw(config.data, config.seed, s, config.train.batch_size, num_examples)
        for s in range(step, step + size)
    ]
    return jax.tree.map(lambda *parts: np.stack(parts), *draws)


def steps_to_next_report(step: int, settings: TrainConfig) -> int:
    periods = settings.log_every, settings.evaluate_every, settings.checkpoint_every
    return min(settings.steps - step, *(period - step % period for period in periods))


def summarize(config: Experiment, parameters: int, rows: list[Row]) -> dict[str, Any]:
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
        "parameters": parameters,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
        "config": config.to_dict(),
    }
