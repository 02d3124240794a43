"""confusion.png and mistakes.png: which classes a network confuses, and its worst mistakes."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from flax_resnet import drawing
from flax_resnet.data import source
from flax_resnet.resnet import abstract
from flax_resnet.training.predictions import Network, Predictions, as_evaluated, looks, predict
from flax_resnet.training.workdir import CONFUSION, MISTAKES, open_run

MOST_CLASSES = 100  # that a matrix can show
MOST_NUMBERED = 30  # classes up to which each cell of the matrix has its count
GAMMA = 0.4  # of the matrix's colours
LONGEST = 18  # letters of a name
MOST_MISTAKES = 24
COLUMNS = 6


def draw_pictures(workdir: Path) -> None:
    """Makes both of a finished run on photographs, unless they are there.

    That one cannot be made is a warning.
    """
    if (workdir / CONFUSION).exists() and (workdir / MISTAKES).exists():
        return
    with drawing.attempted(f"{workdir / CONFUSION} and {MISTAKES}"):
        run = open_run(workdir)
        config, data = run.config, run.config.data
        test = source.load(data, ("test",))["test"]
        network = Network(
            *(abstract(config.model)[0], run.state.params, run.state.batch_stats),
            run.data_facts().normalization,
            batch_size=config.eval_batch_size,
            side=data.side,
        )

        def seen(index: int) -> UInt8[np.ndarray, "h w 3"]:
            return look(index)[0][0]

        look = looks(test, functools.partial(as_evaluated, config=data))
        found = predict(network, test.label, look, threads=data.num_threads)
        classes, title = source.class_names(data), f"{config.model.label}, step {run.step}"
        plot_confusion(found, classes, workdir / CONFUSION, title)
        plot_mistakes(found, classes, seen, workdir / MISTAKES, title)


def plot_confusion(found: Predictions, classes: Sequence[str], path: Path, title: str) -> None:
    """How many images of each true class (rows) were taken for which class (columns).

    A cell is the darker, the larger a part of its row it has; a few hundredths can be seen. With
    more than MOST_CLASSES classes the picture has those that are taken for others most often.
    """
    drawing.import_matplotlib()
    from matplotlib.colors import PowerNorm

    counts = confusion(found, len(classes))
    shown = np.arange(len(classes))
    if len(classes) > MOST_CLASSES:
        wrong = counts.sum(1) - np.diag(counts)
        shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST_CLASSES])
        title += f"\nthe {MOST_CLASSES} of {len(classes)} classes with the most mistakes"
    counts = counts[np.ix_(shown, shown)]
    names = [shortened(classes[i]) for i in shown.tolist()]
    size = len(names)
    cell = 0.42 if size <= 12 else 0.3 if size <= MOST_NUMBERED else 0.14
    side = max(2.4, cell * size)
    margin = 0.085 * max(map(len, names)) + 0.6
    figure = drawing.new_figure(side + margin + 0.9, side + margin + 0.6)
    axes = figure.subplots()
    part = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(part, cmap="Blues", norm=PowerNorm(GAMMA, 0, 1))
    font = 8 if size <= MOST_NUMBERED else 6
    axes.set_xticks(range(size), names, rotation=90, fontsize=font)
    axes.set_yticks(range(size), names, fontsize=font)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.85", lw=0.4)
    axes.tick_params(which="both", length=0)
    for row, column in np.argwhere(counts > 0) if size <= MOST_NUMBERED else ():
        colour = "white" if part[row, column] ** GAMMA > 0.6 else "black"
        text = str(counts[row, column])
        size_of_text = 8 if len(text) < 4 else 6
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size_of_text)
    figure.colorbar(image, ax=axes, shrink=0.7, label="part of the true class")
    axes.set_title(title, fontsize=10)
    drawing.save(figure, path, dpi=150)


def confusion(found: Predictions, number: int) -> Int[np.ndarray, "true predicted"]:
    """Counts by true and by predicted class; an image without either counts nowhere."""
    counts = np.zeros((number, number), int)
    predicted = found.top[:, 0]
    known = (found.label >= 0) & (predicted >= 0)
    np.add.at(counts, (found.label[known], predicted[known]), 1)
    return counts


def plot_mistakes(
    found: Predictions,
    classes: Sequence[str],
    image: Callable[[int], UInt8[np.ndarray, "h w 3"]],
    path: Path,
    title: str,
) -> None:
    """The images whose true class was held least likely, as the network saw them, worst first.

    Args:
        image: gives one by its number.
    """
    wrong = worst(found)
    shown = wrong[:MOST_MISTAKES]
    columns = min(COLUMNS, max(3, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    figure = drawing.new_figure(1.75 * columns, 2.2 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, i in zip(grid.flat, shown.tolist(), strict=False):
        axes.imshow(image(i), interpolation="nearest")
        true, taken = (shortened(classes[int(c)]) for c in (found.label[i], found.top[i, 0]))
        axes.set_title(f"{true}\nas {taken}, {100 * found.probability[i, 0]:.0f} %", fontsize=8)
    told = f"{len(wrong)} mistakes in {len(found.label)} images"
    told += f", the worst {len(shown)}" * (len(wrong) > len(shown))
    figure.suptitle(f"{title}\n{told}", fontsize=10)
    drawing.save(figure, path, dpi=150)


def worst(found: Predictions) -> Int[np.ndarray, " n"]:
    """The images that were taken for another class, by their loss, the largest first."""
    predicted = found.top[:, 0]
    wrong = np.flatnonzero((found.label >= 0) & (predicted >= 0) & (predicted != found.label))
    return wrong[np.argsort(-found.loss[wrong], kind="stable")]


def shortened(name: str) -> str:
    """Long names are often told apart by their ends."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 8]}…{name[-7:]}"
