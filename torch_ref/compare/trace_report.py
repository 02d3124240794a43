"""The parity report: the distances of `trace.py` as a picture and as a page."""

import base64
import html
from pathlib import Path

import numpy as np

from flax_resnet import drawing
from flax_resnet.config import ResNetConfig, Shortcut
from torch_ref.compare.trace import ROUNDING, Comparison, Distances

STYLES = {
    "Flax float64": {"color": "#0072b2", "marker": "o"},
    "Flax float32": {"color": "#d55e00", "marker": "s"},
    "PyTorch float32": {"color": "#d55e00", "ls": "--", "marker": "x"},
    "Flax bfloat16": {"color": "#009e73", "marker": "^"},
}


def write_report(comparison: Comparison, config: ResNetConfig, out: Path) -> list[Path]:
    """Writes parity.png and parity.html into `out`, made if need be; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    picture, page = out / "parity.png", out / "parity.html"
    draw(comparison.series, heading(config), picture)
    page.write_text(make_page(comparison, heading(config), picture.read_bytes()))
    return [picture, page]


def heading(config: ResNetConfig) -> str:
    kind = "plain" if config.shortcut is Shortcut.PLAIN else f"shortcut {config.shortcut.value}"
    return f"Flax against PyTorch, {config.depth} layers, {kind}"


def draw(series: dict[str, Distances], suptitle: str, path: Path) -> None:
    """Both halves on one logarithmic scale: outputs on the left, gradients on the right."""
    figure = drawing.new_figure(10.0, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, which, what in zip(axes, (0, 1), ("output", "gradient"), strict=True):
        for name, by_layer in series.items():
            # A difference of exactly 0 has no logarithm: it is drawn on the floor.
            values = [max(pair[which], 1e-17) for pair in by_layer.values()]
            axis.semilogy(values, ms=3, lw=1.2, label=name, **STYLES[name])
        names = list(series["Flax float64"])
        ticks = np.unique(np.linspace(0, len(names) - 1, min(len(names), 9)).round().astype(int))
        axis.set_xticks(ticks, [names[i] for i in ticks], rotation=45, ha="right")
        axis.set_title(f"each layer's {what}")
        axis.axhline(ROUNDING, color="grey", lw=0.8, ls=":")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative difference from PyTorch in float64")
    axes[0].legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.3))
    figure.suptitle(suptitle)
    drawing.save(figure, path, dpi=150)


def make_page(comparison: Comparison, title: str, picture: bytes) -> str:
    """HTML that needs no other file: the picture, a PNG, is inside."""
    series = comparison.series
    head = "".join(f"<th colspan=2>{html.escape(name)}</th>" for name in series)
    body = "".join(
        f"<tr><th>{layer}</th>"
        + "".join(
            f"<td>{a:.1e}</td><td>{b:.1e}</td>" for a, b in (s[layer] for s in series.values())
        )
        + "</tr>\n"
        for layer in next(iter(series.values()))
    )
    return PAGE.format(
        title=html.escape(title),
        verdict="<br>".join(map(html.escape, comparison.verdict)),
        picture=base64.b64encode(picture).decode(),
        head=head,
        columns="<td>output</td><td>gradient</td>" * len(series),
        body=body,
    )


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
img {{ max-width: 100% }}
td, th {{ padding: .1em .7em; text-align: right }}
tr:nth-child(even) {{ background: #f4f4f4 }}
</style>
<h1>{title}</h1>
<p><strong>{verdict}</strong></p>
<img alt="relative difference by layer" src="data:image/png;base64,{picture}">
<p>Relative difference (L2) from PyTorch in float64 of each layer's output, and of the gradient of
the loss with respect to it.</p>
<table>
<tr><th>layer</th>{head}</tr>
<tr><th></th>{columns}</tr>
{body}</table></html>
"""
