"""How fast is a step, beside PyTorch's? `python scripts/benchmark.py --depths 20,56 --json FILE`.

Times the training step (with its augmentation) and the evaluation of Flax and of torch_ref on the
same random images, for every depth, batch size and compute type. Each variant has a process of its
own; they take turns, --repeats rounds after a warm-up, so that a busy machine slows all alike.
PyTorch is given the best it has: channels_last and all cores, eager and inductor; on a GPU TF32,
bfloat16 autocast, fused SGD, torch.compile's modes and captured CUDA graphs. Flax's variants are
--scans, --streamed, --cures and --xla_flags; that they compute the same shows in the loss of their
first call. On a GPU all variants of a size are prepared at the same time, so that their
compile_seconds are those of a busy host.

Prints a table, and writes a picture (--png) and a list of rows (--json): framework, its version,
device, depth, batch_size, dtype, phase, variant, ms_median, ms_min, ms_max (milliseconds per batch)
and images_per_second. Flax's training rows also say how long compiling took and how long it was to
the end of the first step, the host's time per call, the peak memory, and how many recompilations
and implicit transfers happened while the steps ran.

With --input it is the input alone that is timed, by --threads and --workers, beside PyTorch's
DataLoader with torchvision's transforms: images of 224 pixels from 2,000 JPEGs of 500x375 that are
made of the photographs in --photos.
"""

import itertools
import json
import os
import tempfile
from pathlib import Path

from absl import flags

from flax_resnet import cli
from flax_resnet.config import DType, Experiment
from flax_resnet.errors import ConfigError
from torch_ref.compare import timing_input, timing_table
from torch_ref.compare.timing import Timing, Variant, flax_variants, has_gpu, torch_variants
from torch_ref.compare.timing_turns import take_turns

DEPTHS = flags.DEFINE_list("depths", ["20", "56"], "depths, 6n+2 each")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["128"], "images per batch")
DTYPES = flags.DEFINE_list("dtypes", ["float32"], "compute types: float32, bfloat16, float64")
PHASES = flags.DEFINE_list("phases", ["train", "eval"], "train, eval")
REPEATS = flags.DEFINE_integer("repeats", 5, "rounds that count", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 2.0, "how long one variant runs in a round")
FRAMEWORKS = flags.DEFINE_list("frameworks", ["flax", "torch"], "flax, torch")
STREAMED = cli.define_path(
    "streamed",
    None,
    "one more Flax variant: its images come from this folder, DIR/train/CLASS/*",
)
CURES = flags.DEFINE_bool("cures", False, "also leave out each of `flax_resnet/nn/cpu.py`'s cures")
SCANS = flags.DEFINE_list("scans", ["1"], "Flax variants of training: so many steps per call")
XLA_FLAGS = flags.DEFINE_multi_string(
    "xla_flags", [], "more Flax variants, of all numbers of steps: with this in XLA_FLAGS"
)
INPUT = flags.DEFINE_bool("input", False, "time the input of photographs alone")
CORES = os.cpu_count() or 1
THREADS = flags.DEFINE_list("threads", [f"{CORES}", f"{2 * CORES}"], "that decode, with --input")
WORKERS = flags.DEFINE_list("workers", ["0", f"{CORES}"], "processes that do so, with --input")
PHOTOS = cli.define_path(
    "photos", None, "folder of photographs, with --input; default: ../shared/photos"
)
IMAGES = flags.DEFINE_integer("images", 2000, "JPEGs that --input reads", lower_bound=64)
WITHOUT = flags.DEFINE_list("without", [], "variants to leave out, by name, such as max-autotune")
JSON = cli.define_path("json", None, "file for the rows")
PNG = cli.define_path("png", None, "file for the picture")
cli.define_overrides(
    "They are the same for all variants.",
    (
        "model",
        "optim",
        "data.crop",
        "data.preprocess",
        "data.pad",
        "data.flip",
        "seed",
        "parallel",
        "batch_norm",
    ),
    own={
        "model.depth": "--depths",
        "model.dtype": "--dtypes",
        "train.batch_size": "--batch_sizes",
        "train.steps_per_call": "--scans",
    },
)


def main() -> None:
    if INPUT.value:
        measure_input()
        return
    timings: list[Timing] = []
    for some in wanted_variants():
        turns = take_turns(
            some,
            REPEATS.value,
            SECONDS.value,
            print_failure,
            together=has_gpu(),  # their memory holds all variants, and to wait costs most
        )
        for timing in turns:
            timings.append(timing)
            if line := timing_table.facts_line(timing):
                print(line)
        if JSON.value:  # as it goes, so that a run that is cut off loses little
            rows = [timing.to_dict() for timing in timings]
            JSON.value.write_text(json.dumps(rows, indent=1) + "\n")
    if not timings:
        raise ConfigError("nothing was measured: every variant failed")
    print(timing_table.table(timings))
    if PNG.value:
        timing_table.draw(timings, PNG.value)


def measure_input() -> None:
    check_choices(PHASES, timing_input.PHASES)
    check_choices(FRAMEWORKS, ("flax", "torch"))
    photos = PHOTOS.value or Path(__file__).resolve().parents[2] / "shared/photos"
    threads, workers = integers(THREADS), integers(WORKERS)
    rates: list[timing_input.Rate] = []
    with tempfile.TemporaryDirectory(prefix="flax-resnet-input-") as name:
        root = Path(name)
        timing_input.write_photos(photos, root, IMAGES.value)
        for phase in PHASES.value:  # one after the other: all of a phase are in memory at once
            found = timing_input.loaders(phase, FRAMEWORKS.value, threads, workers)
            measured = timing_input.take_turns(
                found,
                root,
                REPEATS.value,
                SECONDS.value,
                lambda loader: print(f"{loader.name}, {loader.phase}, failed"),
            )
            rates += (of_phase := list(measured))
            print(timing_input.table(of_phase), flush=True)
    if not rates:
        raise ConfigError("nothing was measured: every input failed")
    if JSON.value:
        JSON.value.write_text(json.dumps([rate.to_dict() for rate in rates], indent=1) + "\n")


def sizes() -> list[tuple[Experiment, str]]:
    """The config and phase of every size that the flags name, checked."""
    check_choices(PHASES, ("train", "eval"))
    check_choices(FRAMEWORKS, ("flax", "torch"))
    check_choices(DTYPES, tuple(d.value for d in DType))
    integers(SCANS)
    for flag, framework, phase in (
        (SCANS, "flax", "train"),
        (CURES, "flax", "train"),
        (XLA_FLAGS, "flax", ""),
    ):
        is_used = framework in FRAMEWORKS.value and (not phase or phase in PHASES.value)
        if flag.present and flag.value and not is_used:
            raise ConfigError(f"--{flag.name} is about {framework} {phase}, which is not measured")
    found = []
    for depth, batch_size, dtype in itertools.product(
        integers(DEPTHS), integers(BATCH_SIZES), DTYPES.value
    ):
        config = Experiment()
        config.model.depth, config.model.dtype = depth, DType(dtype)
        config.train.batch_size = batch_size
        config = cli.override(config)
        found += [(config, phase) for phase in PHASES.value]
    cli.check_effects([config for config, _ in found])
    return found


def wanted_variants() -> list[list[Variant]]:
    """Those of every size, but for what --without names."""
    found = [variants(config, phase) for config, phase in sizes()]
    names = {variant.name: None for some in found for variant in some}
    for name in WITHOUT.value:
        if name not in names:
            raise ConfigError(f"--without must be of {', '.join(names)}, got {name!r}")
    if not names.keys() - set(WITHOUT.value):
        raise ConfigError("--without leaves nothing to measure")
    return [[variant for variant in some if variant.name not in WITHOUT.value] for some in found]


def variants(config: Experiment, phase: str) -> list[Variant]:
    found: list[Variant] = []
    if "flax" in FRAMEWORKS.value:
        found += flax_variants(
            config,
            phase,
            folder=STREAMED.value,
            scans=integers(SCANS),
            xla_flags=XLA_FLAGS.value,
            without_cures=CURES.value,
        )
    if "torch" in FRAMEWORKS.value:
        found += torch_variants(config, phase, is_gpu=has_gpu())
    return found


def print_failure(variant: Variant) -> None:
    print(f"{variant.framework} {variant.name} at depth {variant.config.model.depth} failed")


def integers(flag: flags.FlagHolder) -> list[int]:
    try:
        return [int(x) for x in flag.value]
    except ValueError as e:
        raise ConfigError(f"--{flag.name} must be numbers such as 20,56, got {flag.value}") from e


def check_choices(flag: flags.FlagHolder, known: tuple[str, ...]) -> None:
    for choice in flag.value:
        if choice not in known:
            raise ConfigError(f"--{flag.name} must be of {', '.join(known)}, got {choice!r}")


if __name__ == "__main__":
    cli.run(main)
