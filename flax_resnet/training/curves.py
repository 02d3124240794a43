"""curves.png: a run's errors and losses against the step, for whoever looks into its directory."""

from pathlib import Path

from flax_resnet import drawing
from flax_resnet.training.metrics_log import Row


def plot_curves(rows: list[Row], path: Path, title: str) -> None:
    """Error and loss against the step as in the paper's figure 6: bold test, light training."""
    styles = {
        "train": {"color": "tab:blue", "lw": 1, "alpha": 0.6, "label": "training"},
        "validation": {"color": "tab:green", "lw": 2, "label": "validation"},
        "test": {"color": "tab:red", "lw": 2, "label": "test", "marker": "o", "ms": 3},
    }
    figure = drawing.new_figure(9.0, 3.6)
    axes = figure.subplots(1, 2)
    for axis, name, unit in zip(axes, ("error", "loss"), (100, 1), strict=True):
        for split, style in styles.items():
            points = [(row["step"], row[name] * unit) for row in rows if row["split"] == split]
            if points:
                axis.plot(*zip(*points, strict=True), **style)
        axis.set_xlabel("step")
        axis.set_ylabel("error (%)" if name == "error" else "cross-entropy (nats)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    drawing.save(figure, path, dpi=150)
