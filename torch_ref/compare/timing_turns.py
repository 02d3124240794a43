"""Variants side by side: each has a process of its own.

They take turns, so that a busy machine slows all alike.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, NamedTuple

from torch_ref.compare.timing import Ready, Timing, Variant, make_timing


class Started(NamedTuple):
    """A variant's process, which prepares it."""

    variant: Variant
    connection: Connection
    process: Any  # of the "spawn" context


class Worker(NamedTuple):
    """A variant's process, which waits to be told how many steps to run."""

    variant: Variant
    ready: Ready
    connection: Connection
    process: Any


def take_turns(
    variants: list[Variant],
    repeats: int,
    seconds: float,
    report_failure: Callable[[Variant], None],
    *,
    together: bool = False,
) -> Iterator[Timing]:
    """Times variants of the same size: `repeats` rounds after a warm-up.

    Args:
        seconds: how long a variant runs in a round.
        report_failure: called with a variant that could not be prepared; the others go on.
        together: prepare all at the same time; `compile_seconds` is then that of a busy host.
    """
    started = [start(variant) for variant in variants] if together else map(start, variants)
    workers = []
    for one in started:
        worker = when_ready(one)
        if worker is None:
            report_failure(one.variant)
        else:
            workers.append(worker)
    counts = []
    for worker in workers:
        at_once = worker.ready.steps_at_once
        counts.append(steps_per_round(seconds, run(worker, at_once), at_once))
    rounds = [
        [run(worker, n) for worker, n in zip(workers, counts, strict=True)] for _ in range(repeats)
    ]
    for worker, times in zip(workers, zip(*rounds, strict=True), strict=True):
        worker.connection.send(0)
        facts = worker.connection.recv()
        worker.process.join()
        yield make_timing(worker.variant, worker.ready, times, facts)


def start(variant: Variant) -> Started:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, variant), daemon=True)
    process.start()
    theirs.close()
    return Started(variant, ours, process)


def when_ready(one: Started) -> Worker | None:
    """The process once its variant is prepared; None if that failed."""
    try:
        return Worker(one.variant, one.connection.recv(), one.connection, one.process)
    except EOFError:
        return None


def run(worker: Worker, steps: int) -> float:
    """Seconds per step of so many steps."""
    worker.connection.send(steps)
    return worker.connection.recv()


def steps_per_round(seconds: float, seconds_per_step: float, at_once: int) -> int:
    """How many steps take about `seconds`: a multiple of `at_once`, at least one."""
    return max(1, round(seconds / seconds_per_step / at_once)) * at_once


def serve(connection: Connection, variant: Variant) -> None:
    """Runs in the variant's own process: prepares it, then times so many steps whenever told to."""
    if variant.xla_flags:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {variant.xla_flags}".strip()
    # The others need the GPU's memory, too; JAX would take three quarters of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    framework = framework_of(variant)
    prepared = framework.prepare(variant)
    connection.send(prepared.ready)
    while count := connection.recv():
        began = time.perf_counter()
        prepared.run(count)
        connection.send((time.perf_counter() - began) / count)
    peaks = {"peak_host_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    facts = prepared.facts_at_end()
    peak_device = framework.peak_device_bytes()
    if peak_device is not None:
        peaks["peak_device_mib"] = peak_device / 2**20
    connection.send(facts | {name: round(mib) for name, mib in peaks.items()})


def framework_of(variant: Variant) -> ModuleType:
    """The module with `prepare` and `peak_device_bytes`; the other one is never imported."""
    if variant.framework == "flax":
        from torch_ref.compare import timing_flax

        return timing_flax
    from torch_ref.compare import timing_torch

    return timing_torch
