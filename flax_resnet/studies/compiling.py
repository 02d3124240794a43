"""The training step and the evaluation compiled for devices that are not there, and what they need.

The programs are those of `training`, of the same shapes and on the same devices; no image and no
weight is made.
"""

import math
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flax_resnet.config import DType, Experiment, Parallel, Placement, Statistics
from flax_resnet.data import digits, source
from flax_resnet.data.encoded import Images
from flax_resnet.data.examples import Examples
from flax_resnet.data.source import Split
from flax_resnet.data_config import Dataset
from flax_resnet.errors import ConfigError
from flax_resnet.parallel import sharding
from flax_resnet.settings import require
from flax_resnet.step import Program, TrainState, init
from flax_resnet.studies.compiled_text import Reading, read
from flax_resnet.studies.topology import GIB, Chip
from flax_resnet.surroundings import is_out_of_memory, one_line
from flax_resnet.training.evaluation import Evaluation
from flax_resnet.training.feed import make_feed
from flax_resnet.training.loop import call_size, check_batch_size, compile_steps

CIFAR_IMAGES = {"train": 50_000, "test": 10_000}
# Photographs are streamed, so that their number is in no program.
PHOTOGRAPHS = {"train": 10_000, "test": 1_000}
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Unseen(Images):
    """A split of so many images, of which the compiler needs no more."""

    def __init__(self, number: int):
        self.label = np.zeros(number, np.int32)

    def image(self, index: int) -> Any:
        raise NotImplementedError("only the number of its images is known")

    def name(self, index: int) -> str:
        return f"image {index}"


class Task(NamedTuple):
    """A program to compile."""

    name: str  # train or eval
    lowered: jax.stages.Lowered
    images: int  # of a step, on all devices
    steps: int  # of a call


class Memory(NamedTuple):
    """Bytes on each device."""

    arguments: int
    outputs: int  # beside those that take the place of arguments
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return sum(self)


class Compiled(NamedTuple):
    """What the compiler made of a task. All numbers are of one device."""

    task: Task
    seconds: float  # that it took to compile
    memory: Memory
    flops: float  # of a step; each loop in it counts once
    num_bytes: float  # likewise, of what is read and written
    optimal_seconds: float | None  # the compiler's estimate for all that, if it has one
    reading: Reading

    def utilisation(self, chip: Chip) -> tuple[float, float] | None:
        """Of a chip's arithmetic and of its memory's bandwidth, if the estimate holds."""
        seconds = self.optimal_seconds
        if seconds is None:
            return None
        return self.flops / seconds / chip.flops, self.num_bytes / seconds / chip.bandwidth


class TooLarge(NamedTuple):
    """A task whose temporary arrays alone do not fit into a device's memory."""

    task: Task
    seconds: float
    needed: float  # bytes
    available: float


def tasks(config: Experiment, mesh: Mesh, *, evaluation: bool = True) -> Iterator[Task]:
    """The training step as a run calls it most often, and the evaluation of a batch of test images.

    Args:
        config: that has passed `check`.
    """
    splits = {name: split_like(config, name, mesh) for name in CIFAR_IMAGES}
    constants = source.normalization(config.data, ramp(config.data.side))
    program, state = abstract_init(config, mesh)
    feed = make_feed(config, mesh, splits["train"])
    steps = call_size(0, config.train, feed)
    call: Any = compile_steps(config, program, constants, mesh)
    lowered = call.lower(state, feed.constant, feed.like(steps))
    yield Task("train", lowered, config.train.batch_size, steps)
    if evaluation:
        evaluate = Evaluation(
            *(config.model, program, constants, mesh, config.eval_batch_size, config.data)
        )
        lowered = evaluate.lower(state.params, state.batch_stats, splits["test"])
        yield Task("eval", lowered, evaluate.batch_size, 1)


def check(config: Experiment, mesh: Mesh) -> None:
    """Raises ConfigError for what cannot be compiled without being run."""
    config.validate()
    rule = "jit: a pmap compiles for devices that are there"
    require(config.parallel is Parallel.JIT, "parallel", rule, config.parallel.value)
    rule = "false: the network is to be given by its settings"
    require(not config.init_model, "init_model", rule, config.init_model)
    rule = "float32 or bfloat16, which a TPU has"
    require(config.model.dtype is not DType.FLOAT64, "model.dtype", rule, config.model.dtype.value)
    check_batch_size(config.train, mesh)
    if source.is_small(config.data):
        source.check_network(config.data, config.model)
        return
    source.check_channels(config.model)
    is_streamed = config.data.placement is not Placement.RESIDENT
    rule = "streamed: how many photographs there are is not known here"
    require(is_streamed, "data.placement", rule, "resident")


def split_like(config: Experiment, name: str, mesh: Mesh) -> Split:
    """A split as `source.load` gives it, without contents."""
    data = config.data
    if not source.is_small(data):
        return Unseen(PHOTOGRAPHS[name])
    is_digits = data.name is Dataset.DIGITS
    size = len(digits.load()[name].label) if is_digits else CIFAR_IMAGES[name]
    if name == "train":
        size = source.left(data, size)
    if source.placement(data, name, size) is Placement.STREAMED:
        return Unseen(size)
    image = jax.ShapeDtypeStruct((size, data.side, data.side, 3), np.uint8)
    label = jax.ShapeDtypeStruct((size,), np.int32)
    resident: Any = sharding.replicated_like(mesh, (image, label))
    return Examples(*resident)


def ramp(side: int) -> Examples:
    """An image with every level, from which constants can be taken."""
    image = np.resize(np.arange(256, dtype=np.uint8), (1, side, side, 3))
    return Examples(image, np.zeros(1, np.int32))


def abstract_init(config: Experiment, mesh: Mesh) -> tuple[Program, TrainState]:
    """As `init`, without weights."""
    programs: list[Program] = []

    def make() -> TrainState:
        program, state = init(config, mesh.size)
        programs.append(program)
        return state

    state = sharding.replicated_like(mesh, jax.eval_shape(make))
    return programs[0], state


def compile_task(task: Task) -> Compiled | TooLarge:
    """Raises ConfigError if the compiler fails for another reason than too little memory."""
    start = time.perf_counter()
    try:
        compiled = task.lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        seconds = time.perf_counter() - start
        found = amounts(str(e)) if is_out_of_memory(e) else None
        if found is None:
            raise ConfigError(f"the compiler fails: {one_line(e)[:500]}") from e
        return TooLarge(task, seconds, *found)
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    costs: Any = compiled.cost_analysis()
    return Compiled(
        task,
        seconds,
        Memory(
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
        ),
        costs["flops"],
        costs["bytes accessed"],
        # Below 0 where it does not know how long some instruction takes.
        costs["optimal_seconds"] if costs["optimal_seconds"] > 0 else None,
        read(compiled.as_text() or "", task.steps),
    )


def amounts(message: str) -> tuple[float, float] | None:
    """Bytes that are needed, and that there are, as libtpu tells them."""
    found = re.search(
        r"\b([\d.]+)([KMGT])\)? (?:exceeds available HBM \(|of )([\d.]+)([KMGT])", message
    )
    if not found:
        return None
    return float(found[1]) * UNITS[found[2]], float(found[3]) * UNITS[found[4]]


def missing(found: Compiled | TooLarge, chip: Chip | None) -> tuple[float, float] | None:
    """Bytes that a task needs, and that there are, if it needs more."""
    if isinstance(found, TooLarge):
        return found.needed, found.available
    if chip is None or found.memory.total <= chip.memory:
        return None
    return float(found.memory.total), float(chip.memory)


def remedies(
    config: Experiment, task: Task, chips: int, needed: float, available: float
) -> list[str]:
    """The settings that need less memory, are not chosen yet, and change this task."""
    found: list[str] = []
    model, settings = config.model, config.train
    is_training = task.name == "train"
    if is_training and not model.remat:
        found.append("model.remat=True (computes each block twice)")
    if not model.scan_blocks and max(model.architecture.blocks) > 1:
        found.append("model.scan_blocks=True (a smaller program)")
    if model.dtype is DType.FLOAT32:
        found.append("model.dtype=bfloat16")
    each = task.images // chips  # of a device
    fewer = math.floor(each * available / needed)
    name = "train.batch_size" if is_training else "train.eval_batch_size"
    if each > 1:
        unit = settings.accumulate if is_training else 1
        fewer = max(fewer // unit, 1) * unit
        if fewer < each:
            found.append(f"{name}={fewer * chips} ({fewer} images a chip)")
    if is_training and each // settings.accumulate > 1:
        parts = next(n for n in range(settings.accumulate + 1, each + 1) if each % n == 0)
        found.append(f"train.accumulate={parts} (that many smaller batches a step)")
    found.append("more chips")
    return found


def exchanges_statistics(config: Experiment, chips: int) -> bool:
    """Whether batch_norm=replica would leave exchanges out."""
    return chips > 1 and config.batch_norm is Statistics.GLOBAL


def in_gib(number: float) -> str:
    return f"{number / GIB:,.2f} GiB"
