"""A training step on more chips than it was compiled for: arithmetic, exchanges, and the hosts.

    step = cycles / CLOCK + the sum over its exchanges of (hops x HOP + bytes / bandwidth)

Cycles and exchanges are those of the step as it was compiled for so many chips. Where it was not,
they are those of fewer chips that have as many images each, or else of more. docs/scale.md says
what the model leaves out.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flax_resnet import drawing
from flax_resnet.config import Experiment
from flax_resnet.data import source
from flax_resnet.errors import ConfigError
from flax_resnet.json_files import read_json
from flax_resnet.studies import style
from flax_resnet.studies.compiled_text import Collectives

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of a TPU v5e. The first three: "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus).
CLOCK = 1.5e9  # cycles a second
LINK = 4.5e10  # bytes a second, of one link in one direction
HOP = 1e-6  # seconds from one chip to the next
RING = 16  # chips in a row, whose ends are then linked as well
CHIPS_PER_HOST = 8  # docs.cloud.google.com/tpu/docs/v5e
CORES_PER_HOST = 224  # likewise
DECODED = 512  # photographs a second and core: results/images/input.json, two threads on two cores
DEVICE_KIND = "TPU v5 lite"

SHAPES = {1: (1, 1), 8: (2, 4), 64: (8, 8), 256: (16, 16)}  # how so many chips lie


class Step(NamedTuple):
    """A training step that was compiled."""

    name: str  # of the network
    images: int  # of each chip
    chips: int
    cycles: float
    collectives: list[Collectives]
    is_decoded: bool  # whether its images are photographs, which hosts decode


class Point(NamedTuple):
    """A step on so many chips."""

    step: Step  # compiled for as many chips, or for others
    chips: int
    arithmetic: float  # seconds
    exchanges: float  # seconds
    alone: float  # seconds of the same images on one chip

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.exchanges

    @property
    def efficiency(self) -> float:
        """Images a second of each chip, relative to one chip alone."""
        return self.alone / self.seconds

    @property
    def batch(self) -> int:
        return self.step.images * self.chips

    @property
    def images_per_second(self) -> float:
        return self.batch / self.seconds

    @property
    def cores(self) -> int:
        """That each host needs to decode its photographs; 0 where there is nothing to decode."""
        if not self.step.is_decoded:
            return 0
        of_host = self.images_per_second * min(self.chips, CHIPS_PER_HOST) / self.chips
        return math.ceil(of_host / DECODED)


def steps(path: Path) -> list[Step]:
    """The training steps in a file of `compile_for.py --json`; none if it is for other chips.

    Raises:
        ConfigError: the file is another one.
        CheckpointError: it is not JSON.
    """
    told = read_json(path)
    try:
        if told["device_kind"] != DEVICE_KIND:
            return []
        config = Experiment.from_dict(told["config"])
        is_decoded = not source.is_small(config.data)
        return [
            Step(
                config.model.label,
                program["images"] // told["chips"],
                told["chips"],
                program["step"]["cycles"] + program["call"]["cycles"] / program["steps_per_call"],
                [Collectives(*exchange.values()) for exchange in program["step"]["collectives"]],
                is_decoded,
            )
            for program in told["programs"]
            if program["phase"] == "train" and "step" in program  # else it did not fit
        ]
    except (KeyError, TypeError) as e:
        raise ConfigError(f"--model must hold files of compile_for.py --json, got {path}") from e


def points(found: Iterable[Step]) -> list[Point]:
    """Every step on every number of chips, the cheapest first.

    One that was compiled for a single chip alone says nothing of exchanges, and is left out. Of
    several ways to compile the same one the cheapest is taken.
    """
    alike: dict[tuple[str, int], dict[int, Step]] = defaultdict(dict)  # by number of chips
    for step in sorted(found, key=lambda step: -step.cycles):
        alike[step.name, step.images][step.chips] = step
    several = (compiled for compiled in alike.values() if max(compiled) > 1)
    by_cost = sorted(several, key=lambda compiled: compiled[min(compiled)].cycles)
    return [on(compiled, chips) for compiled in by_cost for chips in SHAPES]


def on(compiled: dict[int, Step], chips: int) -> Point:
    """A step on so many chips, as it was compiled for as many, or else for fewer, or else for more.

    Args:
        compiled: the same one, by the number of chips that it was compiled for.
        chips: one of SHAPES.
    """

    def nearest(chips: int) -> Step:
        return compiled[max((n for n in compiled if n <= chips), default=min(compiled))]

    step = nearest(chips)
    waits = [seconds(exchange, step.chips, chips) for exchange in step.collectives]
    return Point(step, chips, step.cycles / CLOCK, sum(waits), nearest(1).cycles / CLOCK)


def seconds(exchange: Collectives, compiled_for: int, chips: int) -> float:
    """How long the chips wait for all exchanges of a kind that nothing overlaps.

    An all-reduce is a reduce-scatter and an all-gather, so that it goes every way twice. What the
    chips gather grows with their number.
    """
    hops = sum(size // 2 if size >= RING else size - 1 for size in SHAPES[chips])
    if not hops or not exchange.number:
        return 0.0
    axes = sum(size > 1 for size in SHAPES[chips])
    is_reduction = exchange.kind == "all-reduce"
    size = exchange.num_bytes * (1 if is_reduction else chips / compiled_for)
    times = 2 if is_reduction else 1
    whole = times * (exchange.number * hops * HOP + size / (2 * LINK * axes))
    return whole * (1 - exchange.overlapping / exchange.number)


def table(found: Sequence[Point]) -> str:
    """In Markdown, a line for each."""
    lines = [
        "| network | images a chip | chips | compiled for | batch | step, ms | of it exchanges "
        "| images/s | efficiency | cores a host |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for x in found:
        cores = f"{x.cores} of {CORES_PER_HOST}" if x.cores else "-"
        lines.append(
            f"| {x.step.name} | {x.step.images} | {x.chips} | {x.step.chips} | {x.batch:,} "
            f"| {1000 * x.seconds:.2f} | {1000 * x.exchanges:.2f} | {x.images_per_second:,.0f} "
            f"| {x.efficiency:.0%} | {cores} |"
        )
    return "\n".join(lines)


def figure(found: Sequence[Point]) -> "Figure":
    """Efficiency by the number of chips, a line for each step.

    Hollow: compiled for others. Pale: with fewer images a chip.
    """
    with style.settings():
        drawn = drawing.new_figure(4.6, 3.2)
        axes = drawn.subplots()
        lines = dict.fromkeys(x.step[:2] for x in found)
        names = list(dict.fromkeys(name for name, _ in lines))
        for name, images in lines:
            look = style.DEPTH_STYLES[names.index(name) % len(style.DEPTH_STYLES)]
            is_fullest = images == max(n for other, n in lines if other == name)
            alpha = 1 if is_fullest else 0.45
            line = [x for x in found if x.step[:2] == (name, images)]
            axes.plot(
                [x.chips for x in line],
                [100 * x.efficiency for x in line],
                color=look.color,
                linestyle=look.line,
                marker=look.marker,
                markersize=4,
                alpha=alpha,
                label=f"{name}, {images} images a chip",
            )
            modelled = [x for x in line if x.step.chips != x.chips]
            axes.plot(
                [x.chips for x in modelled],
                [100 * x.efficiency for x in modelled],
                color=look.color,
                linestyle="none",
                marker=look.marker,
                markerfacecolor="white",
                markersize=4,
                alpha=alpha,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(SHAPES), [str(chips) for chips in SHAPES])
        axes.set_ylim(0, 105)
        axes.set_xlabel("chips (TPU v5e)")
        axes.set_ylabel("images/s of a chip, in % of one alone (modelled)")
        axes.legend(loc="lower left", fontsize=8)
    return drawn
