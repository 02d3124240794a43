"""The figures of a paper on these networks, from finished runs.

Bold lines are test errors, light ones training errors, as in the paper's figure 6 and in
tanjeffreyz's figures. Bands are one sample standard deviation over the seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flax_resnet import drawing
from flax_resnet.config import Shortcut
from flax_resnet.studies.groups import (
    Group,
    at_one_depth,
    depths,
    deviation_of,
    is_plain,
    responded,
    sides,
    stacked,
)
from flax_resnet.studies.published import AKAMASTER, PAPER, PUBLISHED, TANJEFFREYZ
from flax_resnet.studies.style import SHORTCUT_STYLES, Style, response_styles, settings, styles
from flax_resnet.studies.tables import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Sequence[np.ndarray]]  # test curves by label: steps, errors in %
NO_CURVES: Curves = {}

WIDTH = 6.8  # inches: a page's text
BINS = 60  # a training curve is averaged in so many pieces: a line of the log sees few batches


class Drawn(NamedTuple):
    """Names of PNG files."""

    written: list[str]
    failed: list[str]  # which a warning told of


def draw_all(
    groups: Sequence[Group],
    out: Path,
    published: Curves | None = None,
    only: Sequence[str] = (),
) -> Drawn:
    """Every figure that `groups` have the runs for, as PNG and SVG.

    Of several datasets, that of most groups is drawn.

    Args:
        published: curves of `published.read_published_curves`, to be drawn beside ours.
        only: the figures to draw, by name; none: all.
    """
    published = published or {}
    out.mkdir(parents=True, exist_ok=True)
    datasets = [group.config.data.name for group in groups]
    commonest = max(datasets, key=datasets.count)
    groups = short_labels([g for g in groups if g.config.data.name is commonest])
    alike = at_one_depth(groups)
    pair = sides(groups)
    wanted: dict[str, Callable[[], Figure]] = {}
    if len(alike) > 1:
        name = "plain_vs_residual" if len(set(map(is_plain, alike))) == 2 else "curves"
        wanted[name] = partial(curves, alike, published)
    if pair is not None:
        wanted["side_by_side"] = partial(side_by_side, *pair, published)
    if len(depths(groups)) > 1:
        wanted["depth"] = partial(error_by_depth, groups)
    if responded(groups):
        wanted["layer_responses"] = partial(layer_responses, groups)
    if only:
        wanted = {name: draw for name, draw in wanted.items() if name in only}
    written = []
    for name, draw in wanted.items():
        with drawing.attempted(f"{out / name}.png"), settings():
            figure = draw()
            drawing.save(figure, out / f"{name}.png", dpi=200)
            drawing.save(figure, out / f"{name}.svg", metadata={"Date": None})
            written.append(f"{name}.png")
    return Drawn(written, [f"{name}.png" for name in wanted if f"{name}.png" not in written])


def short_labels(groups: Sequence[Group]) -> list[Group]:
    """Without the family, such as " (tanjeffreyz)", if all share it: their tables are narrow."""
    families = {group.label.partition(" (")[2] for group in groups}
    if len(families) > 1:
        return list(groups)
    return [group._replace(label=group.label.partition(" (")[0]) for group in groups]


# --- Error against the step -----------------------------------------------------------------------


def curves(groups: Sequence[Group], published: Curves = NO_CURVES) -> "Figure":
    """Error against the step, and a table of the last errors beside it."""
    figure = drawing.new_figure(WIDTH, 3.3)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    for group, style in zip(groups, styles(groups), strict=True):
        draw_curve(left, group, style, published)
    finish_curves(left, groups, published)
    draw_table(right, groups)
    return figure


def side_by_side(
    plain: Sequence[Group], residual: Sequence[Group], published: Curves = NO_CURVES
) -> "Figure":
    """Plain networks left, residual ones right, by depth."""
    figure = drawing.new_figure(WIDTH, 3.5)
    order = depths([*plain, *residual])
    pair = {"plain": plain, "residual": residual}
    for axes, (title, side) in zip(figure.subplots(1, 2, sharey=True), pair.items(), strict=True):
        for group, style in zip(side, styles(side, by_depth=order), strict=True):
            draw_curve(axes, group, style, published)
        finish_curves(axes, side, published)
        axes.set_title(title, fontsize=10)
    figure.axes[0].set_ylim(0, max(map(top, pair.values())))
    figure.axes[1].set_ylabel("")
    return figure


def draw_curve(axes: "Axes", group: Group, style: Style, published: Curves) -> None:
    """Bold test error with a band over the seeds, light training error; tanjeffreyz's dotted."""
    for theirs in published.get(group.config.model.label.split(" (")[0], []):
        axes.plot(*theirs, color=style.color, ls=(0, (0.5, 1.5)), lw=1)
    steps, errors = stacked(group, "test")
    train_steps, train_errors = binned(*stacked(group, "train"))
    axes.plot(
        train_steps, train_errors.mean(0), color=style.color, ls=style.line, lw=0.7, alpha=0.6
    )
    draw_mean(axes, steps, errors, style, group.label, markers=8, width=1.8)


def draw_mean(
    axes: "Axes",
    x: np.ndarray,
    values: np.ndarray,
    style: Style,
    label: str,
    markers: int,
    width: float,
) -> None:
    """The mean over seeds, and a band of one standard deviation if there are several.

    Args:
        values: (seed, x).
        markers: about how many of the points get one.
        width: of the line, in points; a marker is twice as wide.
    """
    mean, deviation = values.mean(0), deviation_of(values)
    axes.plot(
        x,
        mean,
        color=style.color,
        ls=style.line,
        lw=width,
        marker=style.marker,
        ms=2 * width,
        markevery=max(1, len(x) // markers),
        label=label,
    )
    if len(values) > 1:
        low, high = mean - deviation, mean + deviation
        axes.fill_between(x, low, high, color=style.color, alpha=0.2, lw=0)


def finish_curves(axes: "Axes", groups: Sequence[Group], published: Curves) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.set_ylabel("error (%)")
    axes.set_xlim(0, max(group.config.train.steps for group in groups))
    axes.set_ylim(0, top(groups))
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 10_000 else f"{x:,.0f}")
    legend = axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=2,
        handlelength=4.2,
        columnspacing=1.2,
        title="bold: test, light: training" + (", dotted: tanjeffreyz, test" if published else ""),
    )
    legend.get_title().set_fontsize(8)


def top(groups: Sequence[Group]) -> float:
    """The axis's end: what the second half of training needs; the first errors are off the page."""
    late = []
    for group in groups:
        for split in ("train", "test"):
            steps, errors = binned(*stacked(group, split))
            if len(steps):
                late.append(errors[:, steps >= steps[-1] / 2].max())
    return min(100.0, max(20.0, 1.3 * max(late)))  # 20: the paper's axis


def draw_table(axes: "Axes", groups: Sequence[Group]) -> None:
    axes.axis("off")
    sources = [source for source in PUBLISHED if any(group.published(source) for group in groups)]
    head = ["network", "weights", "test error", *sources]
    cells = [
        [
            group.label,
            f"{group.runs[0].summary['parameters'] / 1e6:.2f}M",
            spread(group.test_errors),
            *("\n".join(f"{x:.2f}" for x in group.published(source)) or "-" for source in sources),
        ]
        for group in groups
    ]
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    widths = [width + 1.5 for width in widths]
    widths = [width / sum(widths) for width in widths]
    table = axes.table(cells, colLabels=head, colWidths=widths, loc="center", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(7.5)
    table.scale(1, 1.5)
    for (row, column), cell in table.get_celld().items():
        cell.set_linewidth(0.5)
        lines = 1 + max(text.count("\n") for text in [head, *cells][row])  # of its tallest cell
        cell.set_height(cell.get_height() * (1 + 0.6 * (lines - 1)))
        cell.get_text().set_fontweight("bold" if row == 0 else "normal")
        cell.get_text().set_horizontalalignment("left" if column == 0 else "center")
    n = {len(group.runs) for group in groups}
    count = f"{min(n)}" if len(n) == 1 else f"{min(n)} to {max(n)}"
    axes.set_title(
        "test error in %, at the last step; "
        + ("one run each" if n == {1} else f"mean ± std of {count} seeds"),
        fontsize=8,
        y=0.1,
    )


# --- Error against depth --------------------------------------------------------------------------


def error_by_depth(groups: Sequence[Group]) -> "Figure":
    """Test error at the last step against depth, with the published values as marked points."""
    figure = drawing.new_figure(WIDTH, 3.2)
    axes = figure.subplots()
    place = {depth: i for i, depth in enumerate(depths(groups))}
    shortcuts = [s for s in Shortcut if any(g.config.model.shortcut is s for g in groups)]
    for shortcut in shortcuts:
        style = SHORTCUT_STYLES[shortcut]
        line = [group for group in groups if group.config.model.shortcut is shortcut]
        x = [place[group.config.model.depth] for group in line]
        mean = np.array([group.test_errors.mean() for group in line])
        deviation = np.array([deviation_of(group.test_errors) for group in line])
        name = "plain" if shortcut is Shortcut.PLAIN else f"residual, {shortcut.value}"
        label = f"{name}, here"
        axes.plot(
            x, mean, color=style.color, ls=style.line, lw=1.8, marker=style.marker, label=label
        )
        axes.fill_between(x, mean - deviation, mean + deviation, color=style.color, alpha=0.2, lw=0)
    beside = 0.025 * (len(place) - 1)  # our points, not upon them
    marks = {PAPER: ("*", 8, -beside), AKAMASTER: ("x", 5.5, beside), TANJEFFREYZ: ("+", 7, beside)}
    for source, (marker, size, shift) in marks.items():
        for shortcut in shortcuts:
            points = [
                (place[group.config.model.depth] + shift, error)
                for group in groups
                if group.config.model.shortcut is shortcut
                for error in group.published(source)
            ]
            if points:
                name = "plain" if shortcut is Shortcut.PLAIN else shortcut.value
                color = SHORTCUT_STYLES[shortcut].color
                axes.plot(
                    *zip(*points, strict=True),
                    color=color,
                    ls="none",
                    marker=marker,
                    ms=size,
                    mew=1.2,
                    label=f"{name}, {source}",
                )
    axes.set_xticks(list(place.values()), [f"{depth}" for depth in place])
    axes.set_xlabel("depth (layers with weights)")
    axes.set_ylabel("test error at the last step (%)")
    steps = sorted({group.config.train.steps for group in groups})
    axes.set_title(f"here: {', '.join(f'{n:,}' for n in steps)} steps", fontsize=9)
    figure.legend(loc="outside right upper", handlelength=3)
    return figure


# --- Layer responses ------------------------------------------------------------------------------


def layer_responses(groups: Sequence[Group]) -> "Figure":
    """Standard deviation of each 3x3 layer's output, in order and by size (paper, figure 7)."""
    figure = drawing.new_figure(WIDTH, 4.4)
    upper, lower = figure.subplots(2, 1)
    shown = responded(groups)
    for group, style in zip(shown, response_styles(shown), strict=True):
        found = np.array([run.responses["std"] for run in group.runs if run.responses])
        ranked = np.sort(found, -1)[:, ::-1]
        for axes, values in ((upper, found), (lower, ranked)):
            x = np.arange(1, values.shape[1] + 1)
            draw_mean(axes, x, values, style, group.label, markers=19, width=1.4)
    for axes, order in ((upper, "layer, from the input on"), (lower, "layer, by size")):
        axes.set_xlabel(order)
        axes.set_ylabel("std of the response")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside right upper", handlelength=4.2)
    return figure


def binned(steps: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same, each at most BINS rows long, by averaging neighbours."""
    if len(steps) <= BINS:
        return steps, errors
    parts = np.array_split(np.arange(len(steps)), BINS)
    return (
        np.array([steps[part].mean() for part in parts]),
        np.stack([errors[:, part].mean(1) for part in parts], 1),
    )
