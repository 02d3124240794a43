"""The benchmark's rows as a table, as lines and as a picture."""

import itertools
import operator
from collections.abc import Sequence
from pathlib import Path

from flax_resnet import drawing
from torch_ref.compare.timing import Timing

HEADER = (
    "| network | batch | dtype | phase | variant | ms (min-max) | images/s | x best PyTorch |\n"
    "|---|---|---|---|---|---|---|---|"
)
LIBRARY = {"flax": "Flax, jax", "torch": "PyTorch"}
COLOURS = {"flax": "#0072B2", "torch": "#E69F00"}


def table(timings: Sequence[Timing]) -> str:
    """In Markdown; the last column is the time over that of the fastest PyTorch of that size."""
    return "\n".join([HEADER, *(line(timing, best_torch(timings, timing)) for timing in timings)])


def line(timing: Timing, best: float | None) -> str:
    """A line of the table; `best` is what to divide by, in milliseconds."""
    t = timing
    ratio = f"{t.ms_median / best:.2f}" if best else "-"
    return (
        f"| ResNet-{t.depth} | {t.batch_size} | {t.dtype} | {t.phase} | {t.framework}, {t.variant} "
        f"| {digits(t.ms_median)} ({digits(t.ms_min)}-{digits(t.ms_max)}) "
        f"| {t.images_per_second:.0f} | {ratio} |"
    )


def digits(ms: float) -> str:
    """A hundredth where a step takes less than ten milliseconds, as on a GPU; else a tenth."""
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"


def best_torch(timings: Sequence[Timing], like: Timing) -> float | None:
    """Milliseconds of the fastest PyTorch at the size of `like`; None if none was timed."""
    return min(
        (t.ms_median for t in timings if t.framework == "torch" and t.size == like.size),
        default=None,
    )


def facts_line(timing: Timing) -> str:
    """What else was measured, as a line; empty if nothing was."""
    if not timing.facts:
        return ""
    shown = (f"{name.replace('_', ' ')} {round(x, 4)}" for name, x in timing.facts.items())
    who = f"{timing.framework} {timing.variant}, ResNet-{timing.depth} {timing.phase}"
    return f"{who}: {', '.join(shown)}"


def draw(timings: Sequence[Timing], path: Path) -> None:
    """A bar for each row: the median, with the fastest and the slowest round.

    What all rows have in common stands in the title.
    """
    figure = drawing.new_figure(10.0, 0.8 + 0.32 * len(timings))
    axis = figure.subplots()
    sizes = [(f"ResNet-{t.depth}", f"batch {t.batch_size}", t.dtype, t.phase) for t in timings]
    is_shared = [len(set(column)) == 1 for column in zip(*sizes, strict=True)]
    shared = itertools.compress(sizes[0], is_shared)
    names = [
        ", ".join(
            [
                *itertools.compress(size, map(operator.not_, is_shared)),
                f"{LIBRARY[t.framework]} {t.version}",
                t.variant,
            ]
        )
        for size, t in zip(sizes, timings, strict=True)
    ]
    errors = [
        [t.ms_median - t.ms_min for t in timings],
        [t.ms_max - t.ms_median for t in timings],
    ]
    axis.barh(
        range(len(timings)),
        [t.ms_median for t in timings],
        xerr=errors,
        color=[COLOURS[t.framework] for t in timings],
        hatch=["" if t.framework == "flax" else "//" for t in timings],
        edgecolor="white",
        error_kw={"lw": 1, "capsize": 2},
    )
    axis.set_yticks(range(len(timings)), names, fontsize=8)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlabel("ms per batch")
    axis.grid(axis="x", alpha=0.3)
    figure.suptitle(
        ", ".join([timings[0].device, *shared, "median, fastest and slowest round"]), fontsize=10
    )
    drawing.save(figure, path, dpi=150)
