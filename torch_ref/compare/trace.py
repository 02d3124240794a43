"""What passes through both networks, layer by layer, and where the two part.

Both get the same random batch, forward and backward in training mode. In float64 two right networks
differ by rounding alone.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from flax_resnet.config import DType, ResNetConfig
from flax_resnet.errors import WeightsError
from flax_resnet.nn.scan import Tree
from flax_resnet.resnet import ResNet, abstract
from flax_resnet.weights.state_dict import to_state_dict
from flax_resnet.weights.trees import tree_to_torch
from torch_ref.resnet import ResNet as TorchResNet

ROUNDING = 1e-9  # float64: a ten-thousandth of one BatchNorm scale already gives 1.7e-5
# A deep plain network multiplies rounding: what a last bit of the image does to PyTorch itself,
# this many times over, is no fault.
SENSITIVITY = 100


class Weights(NamedTuple):
    """A network of either side."""

    config: ResNetConfig
    params: Tree
    batch_stats: Tree


class Trace(NamedTuple):
    """What went through a network: by layer, its output and the loss's gradient there."""

    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]


Distances = dict[str, tuple[float, float]]  # by layer: of outputs, of gradients


class Comparison(NamedTuple):
    """How far two networks are apart."""

    series: dict[str, Distances]  # by framework and type, from theirs in float64
    verdict: list[str]  # a line each; more than one where the networks part


def compare(ours: Weights, theirs: Weights, image: np.ndarray, label: np.ndarray) -> Comparison:
    """Ours in Flax against theirs in PyTorch, on one batch.

    Args:
        image: preprocessed, float64 (b, h, w, 3).

    Raises:
        WeightsError: they are not of one network.
    """
    check_one_network(ours.config, theirs.config)
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
    return Comparison(series, verdict)


def check_one_network(ours: ResNetConfig, theirs: ResNetConfig) -> None:
    """Raises WeightsError unless both have one architecture; how they are computed may differ."""
    if theirs.architecture != ours.architecture:
        raise WeightsError(
            f"both must be one network, got {ours.architecture} and {theirs.architecture}"
        )


def flax_trace(weights: Weights, dtype: DType, image: np.ndarray, label: np.ndarray) -> Trace:
    """Gradients are those of a zero that is added to each layer's output."""
    config = dataclasses.replace(weights.config, dtype=dtype)
    graphdef, like, _ = abstract(config)
    number = jax.tree.leaves(like)[0].dtype
    arrays = weights.params, weights.batch_stats
    params, batch_stats = jax.tree.map(lambda x: jnp.asarray(x, number), arrays)
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
    state = to_state_dict(config.architecture, weights.params, weights.batch_stats)
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
    pairs = zip(ours, theirs, strict=True)
    outputs, gradients = (relative_differences(a, b) for a, b in pairs)
    return {name: (outputs[name], gradients[name]) for name in theirs.outputs}


def relative_differences(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> dict[str, float]:
    """By the size of theirs; where that is zero, by the largest of all."""
    sizes = {name: float(np.linalg.norm(b)) for name, b in theirs.items()}
    largest = max(sizes.values()) or 1.0
    return {
        name: float(np.linalg.norm(ours[name] - b)) / (sizes[name] or largest)
        for name, b in theirs.items()
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
