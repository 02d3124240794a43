"""The two sides of an equation: a Flax network and its PyTorch twin with the same weights."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_resnet.config import (
    DType,
    ResNetConfig,
    Shortcut,
    Stages,
    Stride,
)
from flax_resnet.data import pixels
from flax_resnet.data.pixels import Normalization
from flax_resnet.nn.cpu import compiler_options
from flax_resnet.nn.scan import Tree
from flax_resnet.resnet import ResNet, abstract
from flax_resnet.weights.state_dict import to_state_dict

torch = pytest.importorskip("torch", reason="the other side of every equation here is PyTorch")

from torch_ref import pixels as torch_pixels  # noqa: E402 (it needs torch)
from torch_ref.resnet import ResNet as TorchResNet  # noqa: E402

BATCH_SIZE = 200  # of images that go through a network at once

# The networks with ImageNet's stages, in float64 and with few classes. The last is tanjeffreyz's,
# whose images have one channel.
LARGE = {
    "18-A": ResNetConfig.imagenet(18, Shortcut.A),
    "18-B": ResNetConfig.imagenet(18),
    "34-plain": ResNetConfig.imagenet(34, Shortcut.PLAIN),
    "34-C": ResNetConfig.imagenet(34, Shortcut.C),
    "50-A": ResNetConfig.imagenet(50, Shortcut.A),
    "50-B": ResNetConfig.imagenet(50),
    "50-B, stride on 3x3": ResNetConfig.imagenet(50, stride=Stride.CONV3X3),
    "101-B": ResNetConfig.imagenet(101),
    "152-B": ResNetConfig.imagenet(152),
    "kuangliu-18": ResNetConfig.kuangliu(18),
    "kuangliu-50": ResNetConfig.kuangliu(50),
    "tanjeffreyz-18-B": ResNetConfig.tanjeffreyz(18, Shortcut.B, stages=Stages.IMAGENET),
}
LARGE = {
    name: dataclasses.replace(config, num_classes=10, dtype=DType.FLOAT64)
    for name, config in LARGE.items()
}
QUICK_LARGE = ("50-B, stride on 3x3",)


class Pair(NamedTuple):
    """Ours as (graphdef, params, batch_stats), theirs as a module."""

    config: ResNetConfig
    graphdef: nnx.GraphDef
    params: Tree
    batch_stats: Tree
    twin: TorchResNet

    def model(self) -> ResNet:
        """Ours as a module of its own, in training mode."""
        return nnx.merge(self.graphdef, self.params, self.batch_stats, copy=True)


def make_pair(config: ResNetConfig, seed: int = 0) -> Pair:
    """Random weights everywhere: BatchNorm's scale, bias and running statistics too, and biases.

    Kernels are drawn as the paper draws them, by NumPy: JAX would compile a program for each shape.
    """
    graphdef, params, batch_stats = abstract(config)
    rng = np.random.default_rng(seed)

    def randomize(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            new = rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
        elif name in ("scale", "var"):
            new = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            new = rng.normal(0, 0.2, leaf.shape)
        return jax.numpy.asarray(new, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(randomize, params)
    batch_stats = jax.tree_util.tree_map_with_path(randomize, batch_stats)
    return Pair(config, graphdef, params, batch_stats, make_twin(config, params, batch_stats))


def open_relus(pair: Pair) -> Pair:
    """Adds 2 to the biases of a block's first two BatchNorms: relu lets nearly all pass.

    Then a deep network multiplies a rounding error much less.

    In a network for CIFAR, to the stem's too. Before a max-pool all would pass, and the gradient of
    that bias would be rounding alone: the next BatchNorm takes it away.
    """
    is_small = pair.config.stages is Stages.CIFAR

    def leaf(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        is_open = path[-2].key in ("bn1", "bn2") and (is_small or path[0].key == "stages")
        return x + 2 if is_open and path[-1].key == "bias" else x

    params = jax.tree_util.tree_map_with_path(leaf, pair.params)
    return pair._replace(params=params, twin=make_twin(pair.config, params, pair.batch_stats))


def make_twin(config: ResNetConfig, params: Tree, batch_stats: Tree) -> TorchResNet:
    """The PyTorch network with these weights; shares no memory with them."""
    twin = TorchResNet(config)
    state = to_state_dict(config.architecture, params, batch_stats)
    twin.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
    return twin


def images(
    batch_size: int, seed: int = 0, dtype: str = "float64", *, size: int = 32, channels: int = 3
) -> np.ndarray:
    """Standard normal noise (b, size, size, channels)."""
    shape = (batch_size, size, size, channels)
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def to_torch(image: np.ndarray) -> "torch.Tensor":
    """(b, h, w, 3) as a tensor (b, 3, h, w) of its own memory."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def relative(ours: object, theirs: object) -> float:
    """Largest difference, as a fraction of the largest value of `theirs`."""
    a, b = (np.asarray(x.detach() if hasattr(x, "detach") else x) for x in (ours, theirs))
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())


def flax_logits(model: Any, image: np.ndarray, constants: Normalization) -> np.ndarray:
    """Ours, so many images at a time."""
    call = jax.jit(
        lambda x: model(pixels.normalize(x, constants, jnp.float32)),
        compiler_options=compiler_options(),
    )
    size = len(image)
    image = np.pad(image, ((0, -size % BATCH_SIZE), (0, 0), (0, 0), (0, 0)))
    parts = [call(image[i : i + BATCH_SIZE]) for i in range(0, len(image), BATCH_SIZE)]
    return np.concatenate(parts)[:size]


@torch.inference_mode()
def torch_logits(
    twin: "torch.nn.Module", image: np.ndarray, constants: Normalization
) -> np.ndarray:
    """The twin's, so many images at a time."""
    parts = [
        twin(torch_pixels.normalize(image[i : i + BATCH_SIZE], *constants))
        for i in range(0, len(image), BATCH_SIZE)
    ]
    return torch.cat(parts).numpy()
