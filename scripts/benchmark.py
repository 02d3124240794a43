"""How fast is a step, beside PyTorch's? `python scripts/benchmark.py --depths 20,56 --json FILE`.

Times the training step (with its augmentation) and the evaluation of Flax and of torch_ref on the
same random images, for every depth, batch size and compute type. Each variant has a process of its
own; they take turns, --repeats rounds after a warm-up, so that a busy machine slows all alike.
PyTorch is given the best it has: channels_last and all cores, eager and inductor; on a GPU TF32,
bfloat16 autocast, fused SGD, torch.compile's modes and a captured CUDA graph. Flax's variants are
--scans, --cures and --xla_flags; that they compute the same shows in the loss of their first call.

Prints a table, and writes a picture (--png) and a list of rows (--json): framework, its version,
device, depth, batch_size, dtype, phase, variant, ms_median, ms_min, ms_max (milliseconds per batch)
and images_per_second. Flax's training rows also say how long compiling took and how long it was to
the end of the first step, the host's time per call, the peak memory, and how many recompilations
and implicit transfers happened while the steps ran.
"""

import functools
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from flax_resnet import cli
from flax_resnet.config import DType, Experiment
from flax_resnet.errors import ConfigError

DEPTHS = flags.DEFINE_list("depths", ["20", "56"], "depths, 6n+2 each")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["128"], "images per batch")
DTYPES = flags.DEFINE_list("dtypes", ["float32"], "compute types: float32, bfloat16, float64")
PHASES = flags.DEFINE_list("phases", ["train", "eval"], "train, eval")
REPEATS = flags.DEFINE_integer("repeats", 5, "rounds that count", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 2.0, "how long one variant runs in a round")
FRAMEWORKS = flags.DEFINE_list("frameworks", ["flax", "torch"], "flax, torch")
CURES = flags.DEFINE_bool("cures", False, "also leave out each of `flax_resnet/nn/cpu.py`'s cures")
SCANS = flags.DEFINE_list("scans", [], "more Flax variants: so many steps per call")
XLA_FLAGS = flags.DEFINE_multi_string(
    "xla_flags", [], "more Flax variants, of all numbers of steps: with this in XLA_FLAGS"
)
JSON = flags.DEFINE_string("json", None, "file for the rows")
PNG = flags.DEFINE_string("png", None, "file for the picture")
cli.define_overrides("They are the same for all variants.")

NUM_EXAMPLES = 2000
Row = dict[str, Any]
Steps = Callable[[int], None]  # runs so many steps, and waits for the last


class Job(NamedTuple):
    """One variant of one framework at one size."""

    framework: str
    variant: str
    phase: str
    config: Experiment
    left_out: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


class Ready(NamedTuple):
    """What a job's process tells before it is timed."""

    device: str
    version: str  # of jax or torch
    facts: Row
    steps_at_once: int


# --- Flax -----------------------------------------------------------------------------------------


def prepare_flax(job: Job) -> tuple[Ready, Steps, Callable[[], Row]]:
    """The job's steps, and what to measure about them when all rounds are over."""
    import jax

    from flax_resnet.data import pixels
    from flax_resnet.nn import cpu
    from flax_resnet.parallel import sharding
    from flax_resnet.step import init
    from flax_resnet.training.evaluation import make_evaluate
    from flax_resnet.training.loop import compile_steps, draw_steps

    jax.config.update("jax_enable_x64", job.config.model.dtype is DType.FLOAT64)
    cpu.left_out.update(job.left_out)
    cpu.keep_memory()
    config = job.config
    examples = random_examples()
    constants = pixels.make_normalization(config.data.preprocess, examples.image)
    mesh = sharding.data_mesh()
    began = time.perf_counter()
    program, state = init(config, mesh.size)
    state, examples = sharding.replicate(mesh, (state, examples))
    size = config.train.steps_per_call or 1
    batch_size = config.train.batch_size

    if job.phase == "eval":
        evaluate = make_evaluate(config.model, program, constants, mesh, batch_size)
        few = jax.tree.map(lambda x: x[: batch_size * 4], examples)

        def evaluations(count: int) -> None:
            for _ in range(0, count, 4):
                metrics = evaluate(state.params, state.batch_stats, few)
            jax.block_until_ready(metrics)

        evaluations(4)
        return Ready(flax_device(), jax.__version__, {}, 4), evaluations, dict

    is_cpu = jax.default_backend() == "cpu"
    call = compile_steps(config, program, constants, mesh)
    compilations: list[float] = []  # seconds
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, s, **_: compilations.append(s) if "backend_compile" in event else None
    )
    host_seconds: list[float] = []
    step = 0
    metrics: Any = None

    def steps(count: int) -> None:
        nonlocal state, step, metrics
        for _ in range(0, count, size):
            drawn = draw_steps(config, step, size, NUM_EXAMPLES)
            drawn = sharding.split_batch(mesh, drawn, config.parallel, axis=1)
            began = time.perf_counter()
            state, metrics = call(state, examples, drawn)
            host_seconds.append(time.perf_counter() - began)
            if is_cpu:  # as `loop.train` does
                jax.block_until_ready(metrics)
            step += size
        jax.block_until_ready(metrics)

    steps(size)
    first = time.perf_counter() - began
    facts = {
        "loss_of_first_call": metrics.mean()["loss"],  # the same for the same steps, or it is wrong
        "compile_seconds": sum(compilations),
        "seconds_to_first_step": first,
    }
    steps(2 * size)
    compilations.clear()
    host_seconds.clear()

    def measure() -> Row:
        recompilations = len(compilations)
        try:
            with jax.transfer_guard("disallow"):  # what is not asked for
                steps(2 * size)
            transfers = 0
        except jax.errors.JaxRuntimeError:
            transfers = 1
        return {
            "recompilations": recompilations,
            "implicit_transfers": transfers,
            "host_ms_per_call": 1e3 * statistics.median(host_seconds),
        }

    return Ready(flax_device(), jax.__version__, facts, size), steps, measure


def flax_device() -> str:
    import jax

    device = jax.devices()[0]
    return (
        f"{jax.device_count()} x {device.device_kind}" if device.platform != "cpu" else cpu_name()
    )


# --- PyTorch --------------------------------------------------------------------------------------


def prepare_torch(job: Job) -> tuple[Ready, Steps, Callable[[], Row]]:
    """As `prepare_flax`, with the data, too, on the device."""
    import torch

    from flax_resnet.data import pixels
    from flax_resnet.training.loop import draw_steps
    from torch_ref import pixels as torch_pixels
    from torch_ref.step import eval_step, init, measure

    config, device = job.config, "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    examples = random_examples()
    normalization = pixels.make_normalization(config.data.preprocess, examples.image)
    image = torch.tensor(examples.image, device=device)
    label = torch.tensor(examples.label, device=device).long()
    dtype = torch.float64 if config.model.dtype is DType.FLOAT64 else torch.float32
    constants = [
        x if x is None or isinstance(x, float) else torch.tensor(x, device=device, dtype=dtype)
        for x in normalization
    ]
    state = init(config)
    model = state.model.to(device, memory_format=torch.channels_last)
    if device == "cuda":
        state.optimizer.param_groups[0]["fused"] = True
    autocast = torch.autocast(
        device, torch.bfloat16, enabled=config.model.dtype is DType.BFLOAT16, cache_enabled=False
    )
    mode = {"inductor": "default", "max-autotune": "max-autotune"}.get(job.variant)
    forward = torch.compile(model, mode=mode) if mode else model

    def draw(step: int) -> tuple[Any, ...]:
        drawn = draw_steps(config, step, 1, NUM_EXAMPLES)
        return tuple(torch.as_tensor(x[0]).to(device, non_blocking=True) for x in drawn)

    def train(indices: Any, offset: Any, flip: Any) -> None:
        x = torch_pixels.normalize(image[indices], *constants, dtype)
        x = torch_pixels.crop_and_flip(x, offset, flip, config.data.pad)
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast:
            metrics = measure(forward(x), label[indices])
        (metrics.loss / metrics.examples).backward()
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=job.variant != "cuda graph")

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    if job.phase == "eval":
        size = config.train.batch_size

        def steps(count: int) -> None:
            for i in range(count):
                part = torch.arange(i % 4 * size, (i % 4 + 1) * size, device=device) % NUM_EXAMPLES
                x = torch_pixels.normalize(image[part], *constants, dtype)
                x = x.contiguous(memory_format=torch.channels_last)
                with autocast:
                    eval_step(forward, torch_pixels.Batch(x, label[part]))
            wait()
    elif job.variant == "cuda graph":
        slots = draw(0)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                train(*slots)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            train(*slots)

        def steps(count: int) -> None:
            for i in range(count):
                for slot, new in zip(slots, draw(i), strict=True):
                    slot.copy_(new, non_blocking=True)
                graph.replay()
            wait()
    else:
        model.train()

        def steps(count: int) -> None:
            for i in range(count):
                train(*draw(i))
            wait()

    steps(4)
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return Ready(name, torch.__version__, {}, 1), steps, dict


# --- Taking turns ---------------------------------------------------------------------------------


def serve(connection: Connection, job: Job) -> None:
    """Runs in the job's own process: prepares it, then times so many steps whenever told to."""
    os.environ.update(job.environment)
    prepare = prepare_flax if job.framework == "flax" else prepare_torch
    ready, steps, measure = prepare(job)
    connection.send(ready)
    while count := connection.recv():
        began = time.perf_counter()
        steps(count)
        connection.send((time.perf_counter() - began) / count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    connection.send(measure() | {"peak_host_mib": round(peak)} | device_memory(job))


def device_memory(job: Job) -> Row:
    if job.framework == "flax":
        import jax

        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    else:
        import torch

        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {} if peak is None else {"peak_device_mib": round(peak / 2**20)}


def compare(jobs: list[Job], repeats: int) -> Iterator[Row]:
    """Times jobs of the same size side by side."""
    context = multiprocessing.get_context("spawn")
    workers = []
    for job in jobs:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, job), daemon=True)
        process.start()
        theirs.close()
        try:
            workers.append((job, ours, ours.recv(), process))
        except EOFError:
            print(f"{job.framework} {job.variant} at depth {job.config.model.depth} failed")
    counts, times = [], [[] for _ in workers]
    for _, connection, ready, _ in workers:
        connection.send(ready.steps_at_once)  # a warm-up, and how many steps fill a round
        steps = round(SECONDS.value / connection.recv() / ready.steps_at_once)
        counts.append(max(1, steps) * ready.steps_at_once)
    for _ in range(repeats):
        for worker, count, seconds in zip(workers, counts, times, strict=True):
            worker[1].send(count)
            seconds.append(worker[1].recv())
    for (job, connection, ready, process), seconds in zip(workers, times, strict=True):
        connection.send(0)
        facts = ready.facts | connection.recv()
        process.join()
        median = statistics.median(seconds)
        yield {
            "framework": job.framework,
            "version": ready.version,
            "device": ready.device,
            "depth": job.config.model.depth,
            "batch_size": job.config.train.batch_size,
            "dtype": job.config.model.dtype.value,
            "phase": job.phase,
            "variant": job.variant,
            "ms_median": 1e3 * median,
            "ms_min": 1e3 * min(seconds),
            "ms_max": 1e3 * max(seconds),
            "images_per_second": job.config.train.batch_size / median,
        } | facts


def make_jobs(config: Experiment, phase: str) -> list[Job]:
    """Every variant of one size."""
    is_gpu, jobs = has_gpu(), []
    if "flax" in FRAMEWORKS.value:
        scans = ["1", *SCANS.value] if phase == "train" else ["1"]
        for scan, xla_flags in itertools.product(scans, ["", *XLA_FLAGS.value]):
            settings = cli.override(Experiment.from_dict(config.to_dict()))
            settings.train.steps_per_call = int(scan)
            names = ([] if scan == "1" else [f"{scan} steps per call"]) + xla_flags.split()
            all_flags = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags}".strip()
            environment = (("XLA_FLAGS", all_flags),) if xla_flags else ()
            jobs.append(Job("flax", " ".join(names) or "default", phase, settings, (), environment))
        if CURES.value and phase == "train":
            from flax_resnet.nn.cpu import CURES as cures

            for cure in [*((cure,) for cure in cures), cures]:
                name = f"without {cure[0]}" if len(cure) == 1 else "without any cure"
                jobs.append(Job("flax", name, phase, config, left_out=cure))
    if "torch" in FRAMEWORKS.value:
        variants = ["eager", "inductor"]
        if is_gpu:
            variants += ["max-autotune"] + ["cuda graph"] * (phase == "train")
        jobs += [Job("torch", variant, phase, config) for variant in variants]
    return jobs


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


@functools.cache
def cpu_name() -> str:
    """Such as "2 x AMD EPYC"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else 'CPU'}"


def random_examples() -> Any:
    from flax_resnet.data.examples import Examples

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (NUM_EXAMPLES, 32, 32, 3), np.uint8)
    return Examples(image, rng.integers(0, 10, NUM_EXAMPLES).astype(np.int32))


# --- What people see ------------------------------------------------------------------------------


def print_table(rows: list[Row]) -> None:
    print(
        "| network | batch | dtype | phase | variant | ms (min-max) | images/s | x best PyTorch |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        best = min((r["ms_median"] for r in group(rows, row, "torch")), default=None)
        ratio = f"{row['ms_median'] / best:.2f}" if best else "-"
        print(
            f"| ResNet-{row['depth']} | {row['batch_size']} | {row['dtype']} | {row['phase']} "
            f"| {row['framework']}, {row['variant']} "
            f"| {row['ms_median']:.1f} ({row['ms_min']:.1f}-{row['ms_max']:.1f}) "
            f"| {row['images_per_second']:.0f} | {ratio} |"
        )


def print_facts(row: Row) -> None:
    facts = {k: v for k, v in row.items() if k in FACTS}
    if facts:
        shown = ", ".join(f"{k.replace('_', ' ')} {round(v, 4)}" for k, v in facts.items())
        print(f"{row['framework']} {row['variant']}, ResNet-{row['depth']} {row['phase']}: {shown}")


FACTS = (
    "loss_of_first_call",
    "compile_seconds",
    "seconds_to_first_step",
    "host_ms_per_call",
    "peak_host_mib",
    "peak_device_mib",
    "recompilations",
    "implicit_transfers",
)


def group(rows: list[Row], like: Row, framework: str) -> list[Row]:
    """The rows of one framework at the size of `like`."""
    keys = ("depth", "batch_size", "dtype", "phase")
    return [r for r in rows if r["framework"] == framework and all(r[k] == like[k] for k in keys)]


def plot(rows: list[Row], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    library = {"flax": "Flax, jax", "torch": "PyTorch"}
    names = [
        f"ResNet-{r['depth']}, {r['batch_size']} x {r['dtype']}, {r['phase']}: "
        f"{library[r['framework']]} {r['version']}, {r['variant']}"
        for r in rows
    ]
    colours = {"flax": "#0072B2", "torch": "#E69F00"}
    medians = [r["ms_median"] for r in rows]
    errors = [
        [r["ms_median"] - r["ms_min"] for r in rows],
        [r["ms_max"] - r["ms_median"] for r in rows],
    ]
    axis.barh(
        range(len(rows)),
        medians,
        xerr=errors,
        color=[colours[r["framework"]] for r in rows],
        hatch=["" if r["framework"] == "flax" else "//" for r in rows],
        edgecolor="white",
        error_kw={"lw": 1, "capsize": 2},
    )
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlabel("ms per batch: median, fastest and slowest round")
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(rows[0]["device"], fontsize=10)
    figure.savefig(path, dpi=150)


def integers(flag: flags.FlagHolder) -> list[int]:
    try:
        return [int(x) for x in flag.value]
    except ValueError as e:
        raise ConfigError(f"--{flag.name} must be numbers such as 20,56, got {flag.value}") from e


def check_choices(flag: flags.FlagHolder, known: tuple[str, ...]) -> None:
    for choice in flag.value:
        if choice not in known:
            raise ConfigError(f"--{flag.name} must be of {', '.join(known)}, got {choice!r}")


def main() -> None:
    check_choices(PHASES, ("train", "eval"))
    check_choices(FRAMEWORKS, ("flax", "torch"))
    check_choices(DTYPES, tuple(d.value for d in DType))
    sizes = []
    for depth in integers(DEPTHS):
        for batch_size in integers(BATCH_SIZES):
            for dtype in DTYPES.value:
                config = Experiment()
                config.model.depth, config.model.dtype = depth, DType(dtype)
                config.train.batch_size = batch_size
                config = cli.override(config)
                config.validate()
                sizes += [(config, phase) for phase in PHASES.value]
    integers(SCANS)
    rows: list[Row] = []
    for config, phase in sizes:
        for row in compare(make_jobs(config, phase), REPEATS.value):
            rows.append(row)
            print_facts(row)
        if JSON.value:  # as it goes, so that a run that is cut off loses little
            Path(JSON.value).write_text(json.dumps(rows, indent=1) + "\n")
    if not rows:
        raise ConfigError("nothing was measured: every variant failed")
    print_table(rows)
    if PNG.value:
        plot(rows, PNG.value)


if __name__ == "__main__":
    cli.run(main)
