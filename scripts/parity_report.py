"""Where do two networks part? `python scripts/parity_report.py --config.model.depth=56 --out DIR`.

Runs a Flax network and its PyTorch twin on the same random batch, forward and backward in training
mode, and draws block by block how far they are apart: the relative difference (L2) of each block's
output, and of the loss's gradient with respect to it, in float64, float32 and bfloat16.

Ours has random weights, or those of --checkpoint (a run, or a PyTorch file of a known layout).
Theirs has the same, or those of --state_dict: so a port shows where it departs. In float64 two
right networks differ by rounding alone; the first block that differs by more is named, and the
weights that differ. Exit code 1 if there is one. Writes DIR/parity.png and DIR/parity.html.
"""

import base64
import dataclasses
import html
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from absl import flags
from flax import nnx

from flax_resnet import cli
from flax_resnet.config import ChannelPad, DType, Experiment, ResNetConfig, Shortcut
from flax_resnet.errors import WeightsError
from flax_resnet.nn.scan import Tree
from flax_resnet.resnet import ResNet, abstract
from flax_resnet.step import init
from flax_resnet.training import workdir
from flax_resnet.training.checkpoint import load_state
from flax_resnet.weights import files
from flax_resnet.weights.state_dict import from_state_dict, to_state_dict, tree_to_torch
from torch_ref.resnet import ResNet as TorchResNet

ROUNDING = 1e-9  # float64: a ten-thousandth of one BatchNorm scale already gives 1.7e-5
# A deep plain network multiplies rounding: what a last bit of the image does to PyTorch itself,
# this many times over, is no fault.
SENSITIVITY = 100

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "our weights: a run or a PyTorch file")
STATE_DICT = flags.DEFINE_string("state_dict", None, "their weights, a PyTorch file")
SHORTCUT = flags.DEFINE_enum_class("shortcut", None, Shortcut, "where no key of a file tells")
CHANNEL_PAD = flags.DEFINE_enum_class("channel_pad", None, ChannelPad, "likewise, for option A")
OUT = flags.DEFINE_string("out", "parity_report", "folder of the picture and the page")
IMAGES = flags.DEFINE_integer("images", 8, "random images in the batch", lower_bound=2)
cli.define_overrides("They hold where no --checkpoint is given.")


class Weights(NamedTuple):
    """A network of either side."""

    config: ResNetConfig
    params: Tree
    batch_stats: Tree


Distances = dict[str, tuple[float, float]]  # by layer: of outputs, of gradients


class Trace(NamedTuple):
    """What went through a network: by layer, its output and the loss's gradient there."""

    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


def main() -> None:
    config = cli.override(Experiment())
    jax.config.update("jax_enable_x64", True)
    ours = load(CHECKPOINT.value) if CHECKPOINT.value else random_weights(config)
    theirs = load(STATE_DICT.value) if STATE_DICT.value else ours
    if theirs.config != ours.config:
        raise WeightsError(f"both must be one network, got {ours.config} and {theirs.config}")
    rng = np.random.default_rng(config.seed)
    image = rng.normal(size=(IMAGES.value, 32, 32, 3))
    label = rng.integers(ours.config.num_classes, size=IMAGES.value)

    truth = torch_trace(theirs, DType.FLOAT64, image, label)
    ours_by_dtype = {dtype: flax_trace(ours, dtype, image, label) for dtype in DType}
    series = {
        "Flax float64": distances(ours_by_dtype[DType.FLOAT64], truth),
        "Flax float32": distances(ours_by_dtype[DType.FLOAT32], truth),
        "PyTorch float32": distances(torch_trace(theirs, DType.FLOAT32, image, label), truth),
        "Flax bfloat16": distances(ours_by_dtype[DType.BFLOAT16], truth),
    }
    nudged = torch_trace(theirs, DType.FLOAT64, np.nextafter(image, np.inf), label)
    own = distances(nudged, truth)
    verdict = judge(series["Flax float64"], own, differing_weights(ours, theirs))
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    draw(series, title(ours.config), out / "parity.png")
    write_page(series, title(ours.config), verdict, out)
    print("\n".join(verdict))
    print(f"{out / 'parity.png'} and {out / 'parity.html'} written")
    sys.exit(len(verdict) > 1)


def random_weights(config: Experiment) -> Weights:
    config.model = config.model.block_by_block()
    _, state = init(config)
    return Weights(config.model, state.params, state.batch_stats)


def load(source: str) -> Weights:
    """The network of a run, of `RUN/checkpoints/STEP`, or of a PyTorch file."""
    path = Path(source)
    if path.is_dir():
        directory, step = workdir.locate(path)
        config = workdir.read_config(directory)
        config.model = config.model.block_by_block()
        state = load_state(directory, init(config)[1], step)
        return Weights(config.model, state.params, state.batch_stats)
    imported = from_state_dict(
        files.read(path).state_dict, shortcut=SHORTCUT.value, channel_pad=CHANNEL_PAD.value
    )
    for choice in imported.choices:
        print(f"{path}: {choice}")
    return Weights(imported.config, imported.params, imported.batch_stats)


def flax_trace(weights: Weights, dtype: DType, image: np.ndarray, label: np.ndarray) -> Trace:
    """Gradients are those of a zero that is added to each layer's output."""
    config = dataclasses.replace(weights.config, dtype=dtype)
    graphdef, like, _ = abstract(config)
    number = jax.tree.leaves(like)[0].dtype
    params, batch_stats = jax.tree.map(lambda x: jnp.asarray(x, number), weights[1:])
    x = jnp.asarray(image, number)

    def loss_fn(zeros: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        model: ResNet = nnx.merge(graphdef, params, batch_stats, copy=True)
        outputs = [x]
        for i, (_, layer) in enumerate(model.layers()):
            y = layer(outputs[-1])
            outputs.append(y + zeros[i] if zeros else y)
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs[-1], jnp.asarray(label))
        return loss.mean(), outputs[1:]

    shapes = jax.eval_shape(lambda: loss_fn([])[1])
    zeros = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]
    gradients, outputs = jax.jit(jax.grad(loss_fn, has_aux=True))(zeros)
    names = [name for name, _ in nnx.merge(graphdef, params, batch_stats, copy=True).layers()]
    as_float64 = [[np.asarray(y, np.float64) for y in ys] for ys in (outputs, gradients)]
    return Trace(*(dict(zip(names, ys, strict=True)) for ys in as_float64))


def torch_trace(weights: Weights, dtype: DType, image: np.ndarray, label: np.ndarray) -> Trace:
    """Arrays come back as ours are: (b, h, w, c)."""
    config = dataclasses.replace(weights.config, dtype=dtype)
    twin = TorchResNet(config)
    state = to_state_dict(config, weights.params, weights.batch_stats)
    twin.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
    x = torch.from_numpy(image.transpose(0, 3, 1, 2).copy()).to(twin.fc.weight.dtype)
    outputs: dict[str, torch.Tensor] = {}
    for name, layer in twin.layers():
        x = layer(x)
        x.retain_grad()
        outputs[name] = x
    torch.nn.functional.cross_entropy(x, torch.from_numpy(label)).backward()

    def array(y: torch.Tensor | None) -> np.ndarray:
        assert y is not None
        y = y.detach().double()
        return (y.permute(0, 2, 3, 1) if y.ndim == 4 else y).numpy()

    return Trace(
        {name: array(y) for name, y in outputs.items()},
        {name: array(y.grad) for name, y in outputs.items()},
    )


def distances(ours: Trace, theirs: Trace) -> Distances:
    """By layer, the relative difference of outputs and of gradients."""

    def relative(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return {
        name: (
            relative(ours.outputs[name], theirs.outputs[name]),
            relative(ours.gradients[name], theirs.gradients[name]),
        )
        for name in theirs.outputs
    }


def differing_weights(ours: Weights, theirs: Weights) -> list[str]:
    """Names of the tensors that are not the same in both networks."""
    a, b = (tree_to_torch(w.params) | tree_to_torch(w.batch_stats) for w in (ours, theirs))
    return [name for name in a if not np.array_equal(a[name], b[name])]


def judge(float64: Distances, own: Distances, different: list[str]) -> list[str]:
    """The verdict, a line each; more than one line where the networks part.

    Args:
        own: how far PyTorch is from itself when the image changes in its last bit.
    """

    def parts(name: str, which: int) -> bool:
        limit = max(ROUNDING, SENSITIVITY * own[name][which])
        return not float64[name][which] <= limit  # also for NaN

    names = f": {', '.join(different[:8])}" if different else ""
    weights = f"{len(different)} of the weights differ{names}."
    for name, (forward, _) in float64.items():
        if parts(name, 0):
            line = f"The networks part at {name}: its output differs by {forward:.1e} in float64."
            return [line, weights]
    parted = [name for name in float64 if parts(name, 1)]
    if parted:
        return [f"The gradients part: the last layer whose differs is {parted[-1]}.", weights]
    largest = max(max(pair) for pair in float64.values())
    return [f"No layer differs by more than rounding: {largest:.1e} at the most in float64."]


def title(config: ResNetConfig) -> str:
    kind = "plain" if config.shortcut is Shortcut.PLAIN else f"shortcut {config.shortcut.value}"
    return f"Flax against PyTorch, {config.depth} layers, {kind}"


def draw(series: dict[str, Distances], heading: str, path: Path) -> None:
    styles = {
        "Flax float64": {"color": "#0072b2", "marker": "o"},
        "Flax float32": {"color": "#d55e00", "marker": "s"},
        "PyTorch float32": {"color": "#d55e00", "ls": "--", "marker": "x"},
        "Flax bfloat16": {"color": "#009e73", "marker": "^"},
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, which, what in zip(axes, (0, 1), ("output", "gradient"), strict=True):
        for name, by_layer in series.items():
            # A difference of exactly 0 has no logarithm: it is drawn on the floor.
            values = [max(pair[which], 1e-17) for pair in by_layer.values()]
            axis.semilogy(values, ms=3, lw=1.2, label=name, **styles[name])
        names = list(series["Flax float64"])
        ticks = np.unique(np.linspace(0, len(names) - 1, min(len(names), 9)).round().astype(int))
        axis.set_xticks(ticks, [names[i] for i in ticks], rotation=45, ha="right")
        axis.set_title(f"each layer's {what}")
        axis.axhline(ROUNDING, color="grey", lw=0.8, ls=":")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative difference from PyTorch in float64")
    axes[0].legend(fontsize=8, loc="center right", bbox_to_anchor=(1, 0.3))
    figure.suptitle(heading)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_page(
    series: dict[str, Distances],
    heading: str,
    verdict: list[str],
    out: Path,
) -> None:
    """One file that needs no other: the picture is inside."""
    picture = base64.b64encode((out / "parity.png").read_bytes()).decode()
    head = "".join(f"<th colspan=2>{html.escape(name)}</th>" for name in series)
    body = "".join(
        f"<tr><th>{layer}</th>"
        + "".join(
            f"<td>{a:.1e}</td><td>{b:.1e}</td>" for a, b in (s[layer] for s in series.values())
        )
        + "</tr>\n"
        for layer in next(iter(series.values()))
    )
    page = PAGE.format(
        title=html.escape(heading),
        verdict="<br>".join(map(html.escape, verdict)),
        picture=picture,
        head=head,
        columns="<td>output</td><td>gradient</td>" * len(series),
        body=body,
    )
    (out / "parity.html").write_text(page)


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


if __name__ == "__main__":
    cli.run(main)
