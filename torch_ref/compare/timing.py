"""What the benchmark times: variants of either framework at one size, and a row for each.

`timing_flax.py` and `timing_torch.py` make a variant ready to run, `timing_turns.py` gives each a
process and lets them take turns, `timing_table.py` shows the rows. Nothing here imports torch: Flax
is timed where there is none, too.
"""

import copy
import dataclasses
import functools
import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_resnet.config import LAST_STEP, Crop, Dataset, Experiment
from flax_resnet.data.examples import Examples
from flax_resnet.nn import cpu

NUM_EXAMPLES = 2000
Facts = dict[str, Any]  # what else was measured, by name


class Variant(NamedTuple):
    """One way to run one phase of one size."""

    framework: str  # flax or torch
    name: str
    phase: str  # train or eval
    config: Experiment
    left_out: tuple[str, ...] = ()  # of the cures of `flax_resnet/nn/cpu.py`
    xla_flags: str = ""  # to be added to those of the environment


class Ready(NamedTuple):
    """What a variant's process tells before it is timed."""

    device: str
    version: str  # of jax or torch
    facts: Facts
    steps_at_once: int


class Prepared(NamedTuple):
    """A variant in its own process."""

    ready: Ready
    run: Callable[[int], None]  # so many steps; waits for the last
    facts_at_end: Callable[[], Facts]  # what is known only after the last round


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one variant took for a batch: a row of the benchmark."""

    framework: str
    version: str
    device: str
    depth: int
    batch_size: int
    dtype: str
    phase: str
    variant: str
    ms_median: float
    ms_min: float
    ms_max: float
    images_per_second: float
    facts: Facts

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON has it: the facts stand beside the rest."""
        row = dataclasses.asdict(self)
        return row | row.pop("facts")

    @property
    def size(self) -> tuple[int, int, str, str]:
        """What rows must share to be compared."""
        return self.depth, self.batch_size, self.dtype, self.phase


def make_timing(variant: Variant, ready: Ready, seconds: Sequence[float], facts: Facts) -> Timing:
    """The row of a variant.

    Args:
        seconds: per batch, of each round.
    """
    median, batch_size = statistics.median(seconds), variant.config.train.batch_size
    return Timing(
        framework=variant.framework,
        version=ready.version,
        device=ready.device,
        depth=variant.config.model.depth,
        batch_size=batch_size,
        dtype=variant.config.model.dtype.value,
        phase=variant.phase,
        variant=variant.name,
        ms_median=1e3 * median,
        ms_min=1e3 * min(seconds),
        ms_max=1e3 * max(seconds),
        images_per_second=batch_size / median,
        facts=ready.facts | facts,
    )


def flax_variants(
    config: Experiment,
    phase: str,
    *,
    folder: Path | None = None,
    scans: Sequence[int] = (1,),
    xla_flags: Sequence[str] = (),
    without_cures: bool = False,
) -> list[Variant]:
    """Flax's variants of one size.

    Args:
        folder: one more variant of training: its images are streamed from this folder.
        scans: a variant of training each, with so many steps per call.
        xla_flags: more variants, for every number of steps, each with this in XLA_FLAGS.
        without_cures: more variants of training, without each of the CPU's cures and without any.
    """
    variants = []
    sizes = scans if phase == "train" else [1]
    for size, flags in itertools.product(sizes, ["", *xla_flags]):
        settings = copy.deepcopy(config)
        settings.train.steps_per_call = size
        names = ([] if size == 1 else [f"{size} steps per call"]) + flags.split()
        name = " ".join(names) or "default"
        variants.append(Variant("flax", name, phase, settings, xla_flags=flags))
    if folder is not None and phase == "train":
        settings = copy.deepcopy(config)
        settings.data.name, settings.data.dir = Dataset.FOLDER, str(folder)
        settings.data.train_crop, settings.data.resize = Crop.RANDOM_RESIZED, config.data.side
        settings.train.steps = LAST_STEP
        variants.append(Variant("flax", "streamed", phase, settings))
    if without_cures and phase == "train":
        for cure in cpu.CURES:
            variants.append(Variant("flax", f"without {cure}", phase, config, (cure,)))
        variants.append(Variant("flax", "without any cure", phase, config, cpu.CURES))
    return variants


def torch_variants(config: Experiment, phase: str, *, is_gpu: bool) -> list[Variant]:
    """PyTorch's variants of one size: the best it has on such a device."""
    names = ["eager", "inductor"]
    if is_gpu:
        names += ["max-autotune"]
        names += ["cuda graph", "inductor in a cuda graph"] * (phase == "train")
    return [Variant("torch", name, phase, config) for name in names]


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU, without starting either framework."""
    return Path("/dev/nvidiactl").exists()


@functools.cache
def cpu_name() -> str:
    """Such as "2 x AMD EPYC"."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else 'CPU'}"


def random_examples(config: Experiment) -> Examples:
    """The images and labels that every variant sees, of the side that `config.data` crops."""
    rng, side = np.random.default_rng(0), config.data.side
    image = rng.integers(0, 256, (NUM_EXAMPLES, side, side, 3), np.uint8)
    return Examples(image, rng.integers(0, 10, NUM_EXAMPLES).astype(np.int32))
