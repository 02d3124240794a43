"""Draws the pictures of these pages: `python docs/draw.py`, or `python docs/draw.py NAME...`.

They go to docs/figures as SVG, and with `--png DIR` to DIR as PNG too, to be looked at.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"

# The fill of a box says what it does.
WEIGHTS, NO_WEIGHTS, DATA, EDGE = "#cfe3f5", "#f3f0e6", "#ffffff", "#333333"
PLAIN, RESIDUAL = "#d55e00", "#0072b2"  # Okabe and Ito's colours, which the colour-blind can tell

STYLE = {"font.size": 10, "font.family": "DejaVu Sans", "svg.hashsalt": "flax-resnet"}


def canvas(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Drawing areas in units of about an inch, y upwards, with nothing on them."""
    figure = Figure(figsize=(width, height))
    areas = []
    for i in range(columns):
        ax = figure.add_axes((i / columns, 0, 1 / columns, 1))
        ax.set(xlim=(0, width / columns), ylim=(0, height))
        ax.axis("off")
        areas.append(ax)
    return figure, areas


def box(
    ax: Axes, x: float, y: float, text: str, fill: str, w: float = 1.5, h: float = 0.34
) -> None:
    """A labelled box around its centre."""
    ax.add_patch(
        matplotlib.patches.FancyBboxPatch(
            (x - w / 2, y - h / 2), w, h, "round,pad=0,rounding_size=0.06", fc=fill, ec=EDGE, lw=1
        )
    )
    ax.text(x, y, text, ha="center", va="center", linespacing=1.35)


def plus(ax: Axes, x: float, y: float) -> None:
    ax.add_patch(matplotlib.patches.Circle((x, y), 0.13, fc=DATA, ec=EDGE, lw=1))
    ax.text(x, y - 0.01, "+", ha="center", va="center", fontsize=12)


def path(ax: Axes, *points: tuple[float, float], color: str = EDGE) -> None:
    """A line through the points, with an arrow at its end."""
    for start, end in itertools.pairwise(points[:-1]):
        ax.plot(*zip(start, end, strict=True), color=color, lw=1.2, solid_capstyle="round")
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", points[-1], points[-2], arrowprops=style)


def block() -> Figure:
    """A block of a plain network, and the residual block made of it."""
    figure, (plain, residual) = canvas(7.2, 4.5, columns=2)
    x = 1.6
    for ax, title, result in (
        (plain, "plain block", "relu(F(x))"),
        (residual, "residual block", "relu(F(x) + x)"),
    ):
        ax.text(x, 4.27, title, ha="center", weight="bold")
        ax.text(x - 0.12, 3.97, "x", style="italic", ha="right", va="center")
        ax.text(x, 0.15, result, ha="center", style="italic")
        path(ax, (x, 4.1), (x, 3.77))
        for y, text, fill in (
            (3.6, "3x3 convolution", WEIGHTS),
            (3.12, "BatchNorm", WEIGHTS),
            (2.64, "ReLU", NO_WEIGHTS),
            (2.16, "3x3 convolution", WEIGHTS),
            (1.68, "BatchNorm", WEIGHTS),
        ):
            box(ax, x, y, text, fill)
            if y > 2:
                path(ax, (x, y - 0.17), (x, y - 0.31))
        box(ax, x, 0.72, "ReLU", NO_WEIGHTS)
        path(ax, (x, 0.55), (x, 0.33))
        ax.text(x - 1, 2.64, "F(x)", va="center", ha="center", style="italic")
    path(plain, (x, 1.51), (x, 0.89))
    path(residual, (x, 1.51), (x, 1.33))
    plus(residual, x, 1.2)
    path(residual, (x, 1.07), (x, 0.89))
    around = [(x, 3.95), (x + 1.25, 3.95), (x + 1.25, 1.2), (x + 0.13, 1.2)]
    path(residual, *around, color=RESIDUAL)
    residual.text(x + 1.33, 2.64, "shortcut", color=RESIDUAL, va="center", rotation=270)
    return figure


def network() -> Figure:
    """The whole of ResNet-20."""
    figure, (ax,) = canvas(8.6, 2.5)
    columns = [
        (0.6, "image", "32 x 32\n3 channels", DATA),
        (1.95, "stem", "3x3 convolution\nBatchNorm, ReLU\n32 x 32, 16 filters", WEIGHTS),
        (3.5, "stage 1", "3 blocks\n32 x 32\n16 filters", WEIGHTS),
        (4.85, "stage 2", "3 blocks\n16 x 16\n32 filters", WEIGHTS),
        (6.2, "stage 3", "3 blocks\n8 x 8\n64 filters", WEIGHTS),
        (7.7, "head", "mean over 8 x 8\n64 -> 10 linear", WEIGHTS),
    ]
    widths = [0.9, 1.45, 1.05, 1.05, 1.05, 1.4]
    for (x, name, text, fill), width in zip(columns, widths, strict=True):
        ax.text(x, 2.12, name, ha="center", weight="bold")
        box(ax, x, 1.5, text, fill, w=width, h=0.85)
    for i in range(len(columns) - 1):
        path(ax, (columns[i][0] + widths[i] / 2, 1.5), (columns[i + 1][0] - widths[i + 1] / 2, 1.5))
    for x in (4.17, 5.52):
        path(ax, (x, 0.72), (x, 1.4), color=RESIDUAL)
    ax.text(
        4.85,
        0.52,
        "half the size, twice the filters: here a shortcut must change its shape",
        ha="center",
        color=RESIDUAL,
    )
    ax.text(
        4.3,
        0.18,
        "layers with weights: 1 (stem) + 3 x 3 x 2 (blocks) + 1 (linear) = 20",
        ha="center",
    )
    return figure


def shortcuts() -> Figure:
    """What joins a block's input to its result: plain, A, B and C, at both kinds of block."""
    figure, (ax,) = canvas(8.6, 3.6)
    names = ["plain", "shortcut A", "shortcut B", "shortcut C"]
    same = ["nothing", "x itself", "x itself", "1x1 convolution\nBatchNorm"]
    smaller = [
        "nothing",
        "every 2nd pixel\n+ zero channels",
        "1x1 convolution\nstride 2\nBatchNorm",
        "1x1 convolution\nstride 2\nBatchNorm",
    ]
    xs = [2.35, 4.05, 5.75, 7.45]
    for x, name in zip(xs, names, strict=True):
        ax.text(x, 3.25, name, ha="center", weight="bold")
    for y, label, texts in (
        (2.45, "block that keeps\nits input's shape", same),
        (1.2, "first block of\nstages 2 and 3:\nhalf the size,\ntwice the channels", smaller),
    ):
        ax.text(0.12, y, label, va="center", linespacing=1.35)
        for x, text in zip(xs, texts, strict=True):
            fill = WEIGHTS if "convolution" in text else DATA if text == "nothing" else NO_WEIGHTS
            box(ax, x, y, text, fill, w=1.55, h=0.9)
    ax.text(4.9, 0.25, "blue: has weights that are learnt; cream: has none", ha="center")
    return figure


def padding() -> Figure:
    """Shortcut A, pixel by pixel and channel by channel."""
    figure, areas = canvas(8.6, 2.7, columns=2)
    ax = areas[0]
    ax.text(2.15, 2.45, "every second pixel stays", ha="center", weight="bold")
    for row in range(6):
        for column in range(6):
            keeps = row % 2 == 0 and column % 2 == 0
            corner = (0.35 + 0.28 * column, 1.9 - 0.28 * row)
            fill = RESIDUAL if keeps else DATA
            ax.add_patch(matplotlib.patches.Rectangle(corner, 0.28, 0.28, fc=fill, ec=EDGE, lw=0.8))
    path(ax, (2.25, 1.33), (2.85, 1.33))
    for row in range(3):
        for column in range(3):
            corner = (3.05 + 0.28 * column, 1.6 - 0.28 * row)
            ax.add_patch(
                matplotlib.patches.Rectangle(corner, 0.28, 0.28, fc=RESIDUAL, ec=EDGE, lw=0.8)
            )
    ax = areas[1]
    ax.text(2.15, 2.45, "where the new, zero channels go", ha="center", weight="bold")
    for x, title, first in (
        (0.9, "input", None),
        (2.1, "at the end", 0),
        (3.3, "half and half", 2),
    ):
        size = 4 if first is None else 8
        for i in range(size):
            is_old = first is None or first <= i < first + 4
            corner = (x - 0.3, 1.95 - 0.2 * i)
            fill = RESIDUAL if is_old else DATA
            ax.add_patch(matplotlib.patches.Rectangle(corner, 0.6, 0.2, fc=fill, ec=EDGE, lw=0.8))
        ax.text(x, 0.3, title, ha="center")
    ax.text(2.1, 0.08, "paper, tanjeffreyz", ha="center", fontsize=8)
    ax.text(3.3, 0.08, "akamaster", ha="center", fontsize=8)
    return figure


def projection() -> Figure:
    """The first kernels of a projection from 16 to 32 channels, and what they make of x."""
    figure = Figure(figsize=(8.6, 3.1), layout="constrained")
    rng = np.random.default_rng(0)
    kaiming = rng.normal(0, np.sqrt(2 / 16), (32, 16))
    x = np.maximum(rng.normal(size=(4096, 16)) + 0.5 * rng.normal(size=(4096, 1)), 0)
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    for ax, kernel, title in zip(
        axes, (kaiming, np.full((32, 16), 1 / 16)), ("Kaiming", "averages, 1/16"), strict=False
    ):
        image = ax.imshow(kernel, cmap="RdBu", vmin=-0.7, vmax=0.7, aspect="auto")
        ax.set(title=title, xlabel="input channel", ylabel="output channel", xticks=[0, 15])
        ax.set_yticks([0, 31])
    figure.colorbar(image, ax=axes[1], label="weight")
    ax = axes[2]
    mean = x.mean(1)
    similar = [np.corrcoef(mean, x @ row)[0, 1] for row in kaiming]
    ax.hist(similar, np.linspace(-1, 1, 17), color=PLAIN, label="Kaiming", alpha=0.85)
    ax.axvline(1, color=RESIDUAL, lw=3, label="averages (all 32)")
    ax.set(xlim=(-1.02, 1.05), xlabel="correlation with the mean of x", ylabel="output channels")
    ax.set_title("what the projection passes on")
    ax.set_ylim(0, 8)
    ax.legend(frameon=False, loc="upper left")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return figure


def degradation() -> Figure:
    """Measured: the errors of results/depth-1000 at 20, 32 and 56 layers."""
    figure = Figure(figsize=(7.2, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    depths = (20, 32, 56)
    for name, label, color, marker in (
        ("plain", "plain", PLAIN, "s"),
        ("A", "residual, shortcut A", RESIDUAL, "o"),
    ):
        training, test = [], []
        for depth in depths:
            run = RESULTS / "depth-1000" / f"{name}-{depth}-s0"
            test.append(100 * json.loads((run / "summary.json").read_text())["test_error"])
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            last = [r["error"] for r in rows if r["split"] == "train" and r["step"] > 900]
            training.append(100 * np.mean(last))
        for ax, errors in ((left, training), (right, test)):
            ax.plot(depths, errors, color=color, marker=marker, label=label)
            for depth, error in zip(depths, errors, strict=True):
                above = name == "plain"
                ax.annotate(
                    f"{error:.0f}",
                    (depth, error),
                    (0, 7 if above else -14),
                    textcoords="offset points",
                    ha="center",
                    color=color,
                )
    for ax, title in ((left, "training error"), (right, "test error")):
        ax.set(title=f"{title} after 1,000 steps", xlabel="layers", xticks=depths, ylim=(0, 90))
        ax.grid(axis="y", color="0.9")
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    left.set_ylabel("%")
    left.legend(frameon=False, loc="lower right")
    return figure


def rooms() -> Figure:
    """The rooms of the library, by the floors that parity_tests/test_imports.py holds."""
    floors = [
        ["errors", "shipped", "streams"],
        ["settings", "json_files", "drawing", "surroundings", "places"],
        ["data_config"],
        ["config"],
        ["nn", "data"],
        ["parallel"],
        ["resnet", "optim"],
        ["step", "weights"],
        ["training"],
        ["studies"],
        ["config_file", "setting_flags", "help"],
        ["cli"],
        ["subject"],
        ["scripts", "torch_ref"],
    ]
    science = {"resnet", "optim", "step", "torch_ref"}
    height = 0.5
    figure, (ax,) = canvas(9.6, height * len(floors) + 0.1)
    for level, floor in enumerate(floors):
        y = height * (level + 0.6)
        ax.plot([0.2, 9.4], [y - height / 2, y - height / 2], color="0.85", lw=1)
        apart = 2.6 if len(floor) <= 3 else 1.7
        for i, name in enumerate(floor):
            x = 4.4 + apart * (i - (len(floor) - 1) / 2)
            box(ax, x, y, name, WEIGHTS if name in science else NO_WEIGHTS)
    path(ax, (9.2, height * (len(floors) - 0.4)), (9.2, height * 0.6))
    ax.text(9.1, height * len(floors) / 2, "may import", rotation=90, va="center", ha="right")
    y = height * (len(floors) - 0.4)
    ax.text(0.25, y, "blue: read these first", va="center", fontsize=9)
    return figure


def step() -> Figure:
    """What happens in a training step, and where."""
    figure, (ax,) = canvas(8.6, 3.3)
    ax.text(1.3, 3.05, "host", ha="center", weight="bold")
    ax.text(5.3, 3.05, "device, one compiled program", ha="center", weight="bold")
    ax.add_patch(
        matplotlib.patches.Rectangle((2.55, 0.2), 5.95, 2.7, fc="#fafafa", ec="0.7", ls="--")
    )
    box(
        ax,
        1.3,
        2.4,
        "draw(seed, step)\nwhich images,\nwhich crops, which flips",
        NO_WEIGHTS,
        2,
        0.8,
    )
    box(ax, 3.6, 2.4, "gather, normalise,\ncrop, flip", NO_WEIGHTS, 1.6, 0.8)
    box(ax, 5.5, 2.4, "network, loss\n(training mode)", WEIGHTS, 1.5, 0.8)
    box(ax, 7.4, 2.4, "gradients", NO_WEIGHTS, 1.4, 0.8)
    box(ax, 7.4, 1.2, "weight decay,\nmomentum,\nlearning rate", NO_WEIGHTS, 1.4, 0.9)
    box(
        ax,
        4.6,
        1.2,
        "TrainState: step, weights,\nstatistics, momentum,\nsums for the log",
        DATA,
        2.4,
        0.9,
    )
    box(ax, 1.3, 1.2, "log, evaluate, save", NO_WEIGHTS, 2, 0.6)
    path(ax, (2.3, 2.4), (2.8, 2.4))
    path(ax, (4.4, 2.4), (4.75, 2.4))
    path(ax, (6.25, 2.4), (6.7, 2.4))
    path(ax, (7.4, 2.0), (7.4, 1.65))
    path(ax, (6.7, 1.2), (5.8, 1.2))
    path(ax, (5.3, 1.65), (5.3, 2.0))
    path(ax, (3.4, 1.2), (2.3, 1.2))
    box(ax, 3.6, 0.42, "all images, as bytes", DATA, 1.8, 0.3)
    path(ax, (2.95, 0.57), (2.95, 2.0))
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    f.__name__: f
    for f in (block, network, shortcuts, padding, projection, degradation, rooms, step)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--png", type=Path, help="a directory for PNG copies")
    arguments = parser.parse_args()
    (HERE / "figures").mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name in arguments.names or FIGURES:
            figure = FIGURES[name]()
            # Without a date two runs write the same bytes.
            figure.savefig(HERE / "figures" / f"{name}.svg", metadata={"Date": None})
            if arguments.png:
                figure.savefig(arguments.png / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
