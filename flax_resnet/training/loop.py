"""`fit`: trains a run to its last step, whatever interrupts it."""

import contextlib
import logging
import os
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from flax_resnet import drawing, places, platforms
from flax_resnet.config import Experiment, Parallel, TrainConfig
from flax_resnet.data import source
from flax_resnet.data.examples import Examples
from flax_resnet.data.pixels import Normalization
from flax_resnet.data.source import Split
from flax_resnet.json_files import write_json
from flax_resnet.nn.cpu import keep_memory
from flax_resnet.parallel import sharding
from flax_resnet.parallel.processes import Agreement, is_first, on_first
from flax_resnet.step import Metrics, Program, TrainState, init, train_step
from flax_resnet.training import wandb_log
from flax_resnet.training.checkpoint import Checkpoints
from flax_resnet.training.curves import plot_curves
from flax_resnet.training.evaluation import Evaluation
from flax_resnet.training.feed import Feed, batch_of, make_feed
from flax_resnet.training.metrics_log import MetricsLog, Row, SilentLog, read_metrics
from flax_resnet.training.pictures import draw_pictures
from flax_resnet.training.reporter import Done, Reporter, is_due, progress_bar, wait_for
from flax_resnet.training.signals import Stopped, StopSignal, stop_signal
from flax_resnet.training.starting_network import with_network_of
from flax_resnet.training.starting_weights import with_weights_of
from flax_resnet.training.workdir import (
    CURVES,
    SUMMARY,
    DataFacts,
    begin,
    check_data_facts,
    claimed,
    facts_of,
    keep_config,
    read_summary,
)

Call = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]

log = logging.getLogger(__name__)


def fit(config: Experiment, workdir: Path) -> dict[str, Any]:
    """Trains `config` to its last step in `workdir`, going on from the newest checkpoint there.

    A run that has ended goes on too, if `config` has more steps and the same past.

    Returns:
        The summary, also written to summary.json. A run that is finished does nothing.

    Raises:
        ConfigError: a setting breaks a rule, or `workdir` holds a run of another config.
        DatasetError: the dataset is missing or damaged.
        CheckpointError: `workdir` is in use, or none of its checkpoints is whole.
        TrainingError: the loss is not finite.
        Stopped: after one of `signals.SIGNALS`, once the state is saved. It is a SystemExit.
    """
    config.validate()
    config.require_given()
    workdir = places.local_path(workdir, "workdir")
    config = with_network_of(config, workdir)
    source.check_network(config.data, config.model)
    wandb_log.check(config.wandb)
    keep_memory()
    mesh = sharding.data_mesh()
    check_batch_size(config.train, mesh)
    with stop_signal() as stop, claimed(workdir, config) as before:
        stop.nothing_to_save = True
        summary = on_first(lambda: of_finished_run(workdir, config))
        if summary is not None:
            log.info("%s: finished at step %d, nothing to do", workdir, summary["steps"])
        else:
            splits = source.load(config.data)
            facts = facts_of(config.data, splits)
            on_first(lambda: check_data_facts(workdir, facts))
            parameters, rows = train(config, workdir, mesh, splits, facts, before, stop)

            def report() -> dict[str, Any]:
                summary = summarize(config, parameters, rows)
                summary |= {f"{name}_examples": size for name, size in facts.examples.items()}
                summary["cpu_cores"] = os.cpu_count()
                write_json(workdir / SUMMARY, summary)
                return summary

            summary = on_first(report)
        on_first(lambda: draw_curves(workdir, config.model.label))
        if not source.is_small(config.data):
            on_first(lambda: draw_pictures(workdir))
        log.info("test error %.2f %%, curves in %s", 100 * summary["test_error"], workdir)
        return summary


def of_finished_run(workdir: Path, config: Experiment) -> dict[str, Any] | None:
    """The summary of a run that has made all its steps."""
    summary = read_summary(workdir)
    if summary is None or summary["steps"] != config.train.steps:
        return None
    keep_config(workdir, config)
    return summary


def draw_curves(workdir: Path, title: str) -> None:
    """Makes the picture of a finished run, unless it is there. That it cannot be is a warning."""
    path = workdir / CURVES
    with drawing.attempted(f"{path}"):
        rows = list(read_metrics(workdir / "metrics.jsonl"))
        if rows and not path.exists():
            plot_curves(rows, path, title)


def train(
    config: Experiment,
    workdir: Path,
    mesh: Mesh,
    splits: dict[str, Split],
    facts: DataFacts,
    before: Experiment | None,
    stop: StopSignal,
) -> tuple[int, list[Row]]:
    """Runs the steps that are left; returns the number of parameters and all rows of the log.

    Args:
        before: the run so far.
    """
    program, state = init(config, mesh.size)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    resident = {name: split for name, split in splits.items() if isinstance(split, Examples)}
    state, on_devices = sharding.replicate(mesh, (state, resident))
    examples: dict[str, Split] = {name: on_devices.get(name, splits[name]) for name in splits}
    evaluate = Evaluation(
        *(config.model, program, facts.normalization, mesh, config.eval_batch_size, config.data)
    )
    feed = make_feed(config, mesh, examples["train"])
    log_class = MetricsLog if is_first() else SilentLog
    done: Done | None = None
    stopped_by = 0
    with contextlib.closing(feed), Checkpoints(workdir / "checkpoints") as checkpoints:
        restored = checkpoints.restore(state)
        is_given = restored is None and config.init is not None
        state = with_weights_of(config, state) if is_given else restored or state
        step = int(state.step)
        if step:
            log.info("%s: going on from step %d", workdir, step)
        on_first(lambda: begin(workdir, config, facts))
        if is_given:  # so that they are needed no more
            checkpoints.save(state, None)
        with (
            log_class(workdir, step, config.wandb) as metrics_log,
            progress_bar(config, step) as bar,
        ):
            report = Reporter(config, examples, evaluate, metrics_log, bar, checkpoints, stop, step)
            call = compile_steps(config, program, facts.normalization, mesh)
            if step < config.train.steps:
                call = compile_ahead(config, call, feed, evaluate, state, examples)
            if step:
                report.make_up(state, (before or config).train.evaluate_every)
            calls = run_steps(config, mesh, call, state, feed, stop)
            del state, restored  # whose memory is given to the first call
            if not platforms.on_cpu(mesh):
                calls = delayed(timed(calls))
            with contextlib.closing(calls):
                for done in calls:
                    stopped_by = report(done)
                    if stopped_by:
                        break
    stop.nothing_to_save = True
    if done is not None and stopped_by:
        raise Stopped(stopped_by, f"at step {done.step}, which is saved")
    return parameters, metrics_log.rows


def run_steps(
    config: Experiment,
    mesh: Mesh,
    call: Call,
    state: TrainState,
    feed: Feed,
    stop: StopSignal,
) -> Generator[Done]:
    """Hands call after call to the devices, and tells of each at once: it may still be running.

    Args:
        call: of `compile_steps`.
    """
    settings = config.train
    copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state))
    if config.parallel is not Parallel.PMAP:
        copy = copy.lower(state).compile()  # as in `compile_ahead`
    agreed = Agreement(mesh, delay=1)
    step, stopped_by = int(state.step), 0
    while step < settings.steps and not stopped_by:
        if step % settings.log_every == 0:
            state = state._replace(metrics=sharding.replicate(mesh, Metrics.zeros()))
        size = call_size(step, settings, feed)
        state, metrics = call(state, feed.constant, feed.deal(step, size))
        step += size
        stopped_by = agreed(stop.number)
        is_saved = bool(stopped_by) or is_due(step, settings.checkpoint_every, settings)
        is_evaluated = is_due(step, settings.evaluate_every, settings)
        yield Done(
            step,
            size,
            metrics,
            to_save=copy(state) if is_saved else None,
            to_evaluate=state if is_evaluated else None,
            stopped_by=stopped_by,
        )


def timed(calls: Generator[Done]) -> Generator[Done]:
    """The same calls, each with the time at which it ends, which a thread waits for.

    The host may look later: to hand a GPU the next call can take as long as the call itself.
    """
    with contextlib.closing(calls), ThreadPoolExecutor(1) as waiting:
        for done in calls:
            yield done._replace(ended_at=waiting.submit(wait_for, done.metrics))


def delayed(calls: Generator[Done]) -> Generator[Done]:
    """The same calls, each told when the next is under way, so that no device waits for the host.

    An evaluation holds the next call up: its state is there only until then. Where host and device
    are the same processor this could only lose by two steps' memory at once.
    """
    previous: Done | None = None
    with contextlib.closing(calls):
        for done in calls:
            if previous is not None:
                yield previous
            previous = done
            if done.to_evaluate is not None:
                yield done
                previous = None
        if previous is not None:
            yield previous


def compile_steps(
    config: Experiment, program: Program, constants: Normalization, mesh: Mesh
) -> Call:
    """`call(state, constant, dealt)`, of a `Feed`: as many steps as are dealt, by a scan.

    The metrics of its steps are added to those of the state, and returned.
    """

    def step(state: TrainState, constant: Any, dealt: Any) -> TrainState:
        return train_step(program, state, batch_of(config, constant, dealt, constants))[0]

    def steps(state: TrainState, constant: Any, dealt: Any) -> tuple[TrainState, Metrics]:
        if number_of_steps(dealt) == 1:
            state = step(state, constant, jax.tree.map(lambda x: x[0], dealt))
        else:
            state, _ = lax.scan(lambda s, d: (step(s, constant, d), None), state, dealt)
        return state, state.metrics

    return sharding.compile_step(steps, mesh, config.parallel)


def check_batch_size(settings: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError unless every device gets the same number of examples of a micro-batch."""
    name, size = "train.batch_size", settings.batch_size
    if settings.accumulate > 1:
        name, size = f"{name} / train.accumulate", size // settings.accumulate
    sharding.check_batch_size(mesh, name, size)


def compile_ahead(
    config: Experiment,
    call: Call,
    feed: Feed,
    evaluate: Evaluation,
    state: TrainState,
    examples: Mapping[str, Split],
) -> Call:
    """Compiles all programs that are left to run, the evaluation too; `call` of those.

    A signal cannot be heard while XLA compiles. Before the first step it need not be; later it
    would have to wait, for a deep network minutes.
    """
    if config.parallel is Parallel.PMAP:  # whose results lie elsewhere than what it began with
        return call
    for split in examples:
        if split != "train":
            evaluate.compile(state.params, state.batch_stats, examples[split])
    sizes: set[int] = set()
    step = int(state.step)
    while step < config.train.steps:
        sizes.add(size := call_size(step, config.train, feed))
        step += size
    lower: Callable[..., jax.stages.Lowered] = call.lower  # pyright: ignore
    programs = {
        size: lower(state, feed.constant, feed.like(size)).compile()
        for size in sorted(sizes)  # in every process alike
    }
    return lambda state, constant, dealt: programs[number_of_steps(dealt)](state, constant, dealt)


def number_of_steps(dealt: Any) -> int:
    return len(jax.tree.leaves(dealt)[0])


def call_size(step: int, settings: TrainConfig, feed: Feed) -> int:
    """How many steps go into the next call."""
    most = min(settings.log_every, feed.most_steps or settings.log_every)
    usual = 1 if platforms.on_cpu(feed.mesh) else most
    return min(settings.steps_per_call or usual, steps_to_next_report(step, settings))


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
    seconds = [row["seconds"] for row in train_rows if "seconds" in row]
    rates = [row["images_per_second"] for row in train_rows if "images_per_second" in row]
    return results | {
        "steps": config.train.steps,
        "wall_seconds": seconds[-1] if seconds else None,
        "images_per_second": median(rates) if rates else None,
        "parameters": parameters,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
        "config": config.to_dict(),
    }
