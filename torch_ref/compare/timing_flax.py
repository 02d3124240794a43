"""A Flax variant made ready to be timed, and what JAX tells of it besides."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from flax_resnet.config import Dataset, DType, Experiment
from flax_resnet.data import source
from flax_resnet.data.examples import Examples
from flax_resnet.data.pixels import Normalization
from flax_resnet.data.source import Split
from flax_resnet.nn import cpu
from flax_resnet.parallel import sharding
from flax_resnet.step import Program, TrainState, init
from flax_resnet.training.evaluation import Evaluation
from flax_resnet.training.feed import make_feed
from flax_resnet.training.loop import compile_steps
from torch_ref.compare.timing import (
    Facts,
    Prepared,
    Ready,
    Variant,
    cpu_name,
    random_examples,
)


def prepare(variant: Variant) -> Prepared:
    """Compiles the variant and runs it a few times."""
    jax.config.update("jax_enable_x64", variant.config.model.dtype is DType.FLOAT64)
    cpu.left_out.update(variant.left_out)
    cpu.keep_memory()
    config, mesh = variant.config, sharding.data_mesh()
    is_streamed = config.data.name is Dataset.FOLDER
    if is_streamed:
        examples = source.load(config.data, ("train",))["train"]
    else:
        examples = random_examples(config)
    constants = source.normalization(config.data, examples)
    prepare_phase = prepare_training if variant.phase == "train" else prepare_evaluation
    return prepare_phase(config, mesh, examples, constants)


def prepare_evaluation(
    config: Experiment, mesh: Mesh, examples: Split, constants: Normalization
) -> Prepared:
    """Four batches at a time."""
    batch_size = config.train.batch_size
    program, state, examples = start(config, mesh, examples)
    evaluate = Evaluation(config.model, program, constants, mesh, batch_size)
    assert isinstance(examples, Examples)
    few = jax.tree.map(lambda x: x[: batch_size * 4], examples)

    metrics: Any = None

    def run(count: int) -> None:
        nonlocal metrics
        for _ in range(0, count, 4):
            metrics = evaluate(state.params, state.batch_stats, few)
        jax.block_until_ready(metrics)

    run(4)
    return Prepared(Ready(device_name(), jax.__version__, {}, 4), run, dict)


def prepare_training(
    config: Experiment, mesh: Mesh, examples: Split, constants: Normalization
) -> Prepared:
    """As many steps at a time as the variant has in a call."""
    size = config.train.steps_per_call or 1
    is_cpu = jax.default_backend() == "cpu"
    began = time.perf_counter()
    program, state, examples = start(config, mesh, examples)
    feed = make_feed(config, mesh, examples)
    call = compile_steps(config, program, constants, mesh)
    compilations = listen_for_compilations()
    host_seconds: list[float] = []
    step = 0
    metrics: Any = None

    def run(count: int) -> None:
        nonlocal state, step, metrics
        for _ in range(0, count, size):
            dealt = feed.deal(step, size)
            began = time.perf_counter()
            state, metrics = call(state, feed.constant, dealt)
            host_seconds.append(time.perf_counter() - began)
            if is_cpu:  # as `loop.train` does
                jax.block_until_ready(metrics)
            step += size
        jax.block_until_ready(metrics)

    run(size)
    first = time.perf_counter() - began
    facts = {
        "loss_of_first_call": metrics.mean()["loss"],  # the same for the same steps, or it is wrong
        "compile_seconds": sum(compilations),
        "seconds_to_first_step": first,
    }
    run(2 * size)
    compilations.clear()
    host_seconds.clear()

    def facts_at_end() -> Facts:
        return {
            "recompilations": len(compilations),
            "implicit_transfers": implicit_transfers(lambda: run(2 * size)),
            "host_ms_per_call": 1e3 * statistics.median(host_seconds),
        }

    return Prepared(Ready(device_name(), jax.__version__, facts, size), run, facts_at_end)


def start(config: Experiment, mesh: Mesh, examples: Split) -> tuple[Program, TrainState, Split]:
    """A network at step 0 and, if it is resident, its data, on every device."""
    program, state = init(config, mesh.size)
    if not isinstance(examples, Examples):
        return program, sharding.replicate(mesh, state), examples
    return program, *sharding.replicate(mesh, (state, examples))


def listen_for_compilations() -> list[float]:
    """A list that from now on gets the seconds of every compilation."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if "backend_compile" in event:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def implicit_transfers(run: Callable[[], None]) -> int:
    """1 if `run` moves what nobody asked it to move between host and device, else 0."""
    try:
        with jax.transfer_guard("disallow"):
            run()
    except jax.errors.JaxRuntimeError:
        return 1
    return 0


def device_name() -> str:
    """Such as "1 x NVIDIA H100", or the processor's."""
    device = jax.devices()[0]
    is_cpu = device.platform == "cpu"
    return cpu_name() if is_cpu else f"{jax.device_count()} x {device.device_kind}"


def peak_device_bytes() -> int | None:
    """Of the first device; None where it does not tell, such as on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
