"""A network layer by layer: sizes, parameters and multiply-adds (paper, table 1).

All from shapes: no weight is made and nothing is computed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resnet.config import ResNetConfig
from flax_resnet.nn.keys import keys
from flax_resnet.nn.pooling import MaxPool
from flax_resnet.resnet import ResNet, check_images

Size = tuple[int, int]


class Row(NamedTuple):
    """A layer with weights, or the max-pool."""

    name: str  # of its tensors, such as stages.0.0.conv1
    kind: str  # such as "3x3, 64 -> 64, stride 2"
    size: Size  # of its output: height and width
    channels: int  # of its output
    parameters: int  # those of a BatchNorm that follows it among them
    multiply_adds: int  # of one image


class Description(NamedTuple):
    """Every layer of a network, from the image on."""

    rows: list[Row]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        """What the paper calls FLOPs: of convolutions and the classifier."""
        return sum(row.multiply_adds for row in self.rows)


def describe(config: ResNetConfig, size: Size) -> Description:
    """The layers of a network for images of that height and width.

    Raises:
        ConfigError: there is no such network, or it takes no such images.
    """
    config = config.block_by_block()
    architecture = config.architecture
    check_images(architecture, architecture.image_channels, size)
    model = nnx.eval_shape(lambda: ResNet(config, rngs=keys(0)))
    image = jax.ShapeDtypeStruct((1, *size, architecture.image_channels), jnp.float32)
    return Description(list(rows(model, image)))


def rows(model: ResNet, x: Any) -> Iterator[Row]:
    x, row = after("conv1", model.conv1, x, model.bn1)
    yield row
    if model.max_pool is not None:
        x, row = after("max_pool", model.max_pool, x)
        yield row
    for s, stage in enumerate(model.stages):
        for b, block in enumerate(stage):
            prefix, y = f"stages.{s}.{b}", x
            for i in (1, 2, 3):
                if hasattr(block, f"conv{i}"):
                    layers = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
                    y, row = after(f"{prefix}.conv{i}", layers[0], y, layers[1])
                    yield row
            if hasattr(block.shortcut, "conv"):
                shortcut = block.shortcut
                yield after(f"{prefix}.shortcut.conv", shortcut.conv, x, shortcut.bn)[1]
            x = y
    pooled = jax.ShapeDtypeStruct((1, 1, 1, x.shape[-1]), x.dtype)
    yield after("fc", model.fc, pooled)[1]


def after(
    name: str, layer: nnx.Module, x: Any, batch_norm: nnx.Module | None = None
) -> tuple[Any, Row]:
    """The shape of a layer's result for x, and its row."""
    y = nnx.eval_shape(lambda layer, x: layer(x), layer, x)
    _, height, width, channels = y.shape
    weights = [nnx.state(each, nnx.Param) for each in (layer, batch_norm) if each is not None]
    kernel = getattr(layer, "kernel", None)
    row = Row(
        name=name,
        kind=kind(layer),
        size=(height, width),
        channels=channels,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(weights)),
        multiply_adds=0 if kernel is None else kernel.size * height * width,
    )
    return y, row


def kind(layer: nnx.Module) -> str:
    if isinstance(layer, MaxPool):
        return "max-pool 3x3, stride 2"
    if isinstance(layer, nnx.Conv):
        *window, c_in, c_out = layer.kernel_shape
        stride = layer.strides or 1
        stride = stride if isinstance(stride, int) else max(stride)
        told = f", stride {stride}" if stride > 1 else ""
        return f"{'x'.join(map(str, window))}, {c_in} -> {c_out}{told}"
    assert isinstance(layer, nnx.Linear)
    return f"average, {layer.in_features} -> {layer.out_features}"
