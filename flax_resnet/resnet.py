"""The residual networks of He, Zhang, Ren and Sun 2015: table 1 (ImageNet), section 4.2 (CIFAR).

Lay `torch_ref/resnet.py` beside it: the two differ in `nnx` against `nn`, and in NHWC against NCHW.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flax_resnet.config import (
    Architecture,
    Block,
    ChannelPad,
    DType,
    Init,
    Projection,
    ProjectionInit,
    ResNetConfig,
    Shortcut,
    Stem,
    Stride,
)
from flax_resnet.errors import ConfigError
from flax_resnet.nn.batch_norm import BatchNorm
from flax_resnet.nn.convolution import Conv
from flax_resnet.nn.keys import keys
from flax_resnet.nn.pooling import MaxPool
from flax_resnet.nn.scan import Scan, Tree, rematerialized

Layer = Callable[[Array], Array]
kaiming_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")  # not truncated
torch_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # +-1/sqrt(fan in)


class ResNet(nnx.Module):
    """Stem, stages of blocks, global average, classifier.

    Args:
        config: depth, kind of shortcut and the other options.
        rngs: its `params` stream initialises the weights.

    Attributes:
        architecture: what a checkpoint of this network fixes.

    Raises:
        ConfigError: there is no such network.
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.architecture = config.architecture
        is_large = config.stem in (Stem.CONV7_BN_RELU_POOL, Stem.CONV7_POOL)
        has_bn = config.stem in (Stem.CONV_BN_RELU, Stem.CONV7_BN_RELU_POOL)
        size, stride = (7, 2) if is_large else (3, 1)
        c_in, *_ = self.architecture.widths
        self.conv1 = conv(config, config.image_channels, c_in, size, stride, rngs=rngs)
        self.bn1 = batch_norm(config, c_in) if has_bn else None
        self.max_pool = MaxPool() if is_large else None
        self.remat = config.remat
        self.stages = nnx.List()
        block = BLOCKS[self.architecture.block]
        for s, width in enumerate(self.architecture.widths):
            stage = nnx.List()
            for i in range(self.architecture.blocks[s]):
                stride = 2 if i == 0 and s > 0 else 1
                stage.append(block(config, c_in, width, stride, rngs=rngs))
                c_in = width * block.expansion
            if config.scan_blocks and len(stage) > 1:
                stage = nnx.List([stage[0], Scan(stage[1:], remat=config.remat)])
            self.stages.append(stage)
        self.fc = linear(config, c_in, config.num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Logits of a batch of preprocessed images, in the parameters' type.

        Raises:
            ConfigError: the images have another number of channels, or no pixels.
        """
        return self.head(self.features(x)[-1])

    def features(self, x: Float[Array, "b h w c"]) -> list[Float[Array, "b _h _w _c"]]:
        """What a batch of preprocessed images is after the stem, and after each stage.

        Raises:
            ConfigError: the images have another number of channels, or no pixels.
        """
        check_images(self.architecture, x.shape[-1], x.shape[1:3])
        found = [self.stem(x)]
        for stage in self.stages:
            x = found[-1]
            for block in stage:
                x = self._layer(block)(x)
            found.append(x)
        return found

    def layers(self) -> list[tuple[str, Layer]]:
        """What x passes through, by name: stem, every block (or scan over blocks), head."""
        blocks = [
            (f"stages.{s}.{b}", self._layer(block))
            for s, stage in enumerate(self.stages)
            for b, block in enumerate(stage)
        ]
        return [("stem", self.stem), *blocks, ("head", self.head)]

    def _layer(self, block: nnx.Module) -> Layer:
        return partial(rematerialized, block) if self.remat else block

    def stem(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = self.conv1(x)
        x = x if self.bn1 is None else self.bn1(x, relu=True)
        return x if self.max_pool is None else self.max_pool(x)

    def head(self, x: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        return self.fc(x.mean((1, 2)))


def check_images(architecture: Architecture, channels: int, size: tuple[int, ...]) -> None:
    """Raises ConfigError unless the network takes images of so many channels and pixels."""
    if channels != architecture.image_channels or min(size) < 1:
        raise ConfigError(
            f"images must have {architecture.image_channels} channel(s) and at least one pixel, "
            f"got {channels} channel(s) of {' x '.join(map(str, size))} pixels"
        )


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions around a shortcut: relu(residual(x) + shortcut(x)) (paper, figure 2)."""

    expansion = 1  # output channels over `width`

    def __init__(self, config: ResNetConfig, c_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        c_out = width * self.expansion
        self.conv1 = conv(config, c_in, width, 3, stride, rngs=rngs)
        self.bn1 = batch_norm(config, width)
        self.conv2 = conv(config, width, c_out, 3, rngs=rngs)
        self.bn2 = batch_norm(config, c_out)
        self.shortcut = make_shortcut(config, c_in, c_out, stride, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y = self.bn1(self.conv1(x), relu=True)
        shortcut = None if self.shortcut is None else self.shortcut(x)
        return self.bn2(self.conv2(y), add=shortcut, relu=True)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut (paper, figure 5, right)."""

    expansion = 4

    def __init__(self, config: ResNetConfig, c_in: int, width: int, stride: int, *, rngs: nnx.Rngs):
        c_out = width * self.expansion
        strides = (stride, 1) if config.stride is Stride.CONV1X1 else (1, stride)
        self.conv1 = conv(config, c_in, width, 1, strides[0], rngs=rngs)
        self.bn1 = batch_norm(config, width)
        self.conv2 = conv(config, width, width, 3, strides[1], rngs=rngs)
        self.bn2 = batch_norm(config, width)
        self.conv3 = conv(config, width, c_out, 1, rngs=rngs)
        self.bn3 = batch_norm(config, c_out)
        self.shortcut = make_shortcut(config, c_in, c_out, stride, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        shortcut = None if self.shortcut is None else self.shortcut(x)
        return self.bn3(self.conv3(y), add=shortcut, relu=True)


BLOCKS = {Block.BASIC: BasicBlock, Block.BOTTLENECK: Bottleneck}


class ZeroPad(nnx.Module):
    """Option A: every stride-th pixel, and new channels that are zero."""

    def __init__(self, channel_pad: ChannelPad, c_in: int, c_out: int, stride: int):
        self.stride = stride
        new = c_out - c_in
        before = new // 2 if channel_pad is ChannelPad.CENTRE else 0
        self.pad = (before, new - before)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = x[:, :: self.stride, :: self.stride, :]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), self.pad))


class Projection1x1(nnx.Module):
    """Options B and C: a 1x1 convolution, with BatchNorm or (tanjeffreyz) with a bias."""

    def __init__(self, config: ResNetConfig, c_in: int, c_out: int, stride: int, *, rngs: nnx.Rngs):
        average = nnx.initializers.constant(1 / c_in)
        self.conv = Conv(
            c_in,
            c_out,
            (1, 1),
            strides=stride,
            padding=0,
            use_bias=config.projection is Projection.CONV_BIAS,
            kernel_init=(
                average if config.projection_init is ProjectionInit.AVERAGE else kaiming_normal
            ),
            dtype=compute_dtype(config),
            param_dtype=param_dtype(config),
            rngs=rngs,
        )
        has_bn = config.projection is Projection.CONV_BN
        self.bn = batch_norm(config, c_out) if has_bn else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        x = self.conv(x)
        return x if self.bn is None else self.bn(x)


class Identity(nnx.Module):
    """The shortcut of options A and B where the shape stays."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x


def make_shortcut(
    config: ResNetConfig, c_in: int, c_out: int, stride: int, *, rngs: nnx.Rngs
) -> nnx.Module | None:
    """What joins a block's input to its residual; None in a plain network."""
    same_shape = c_in == c_out and stride == 1
    match config.shortcut:
        case Shortcut.PLAIN:
            return None
        case Shortcut.A | Shortcut.B if same_shape:
            return Identity()
        case Shortcut.A:
            return ZeroPad(config.channel_pad, c_in, c_out, stride)
        case Shortcut.B | Shortcut.C:
            return Projection1x1(config, c_in, c_out, stride, rngs=rngs)


def conv(
    config: ResNetConfig, c_in: int, c_out: int, size: int, stride: int = 1, *, rngs: nnx.Rngs
) -> Conv:
    return Conv(
        c_in,
        c_out,
        (size, size),
        strides=stride,
        padding=size // 2,  # on both sides, like PyTorch: at stride 2 "SAME" pads (0, 1)
        use_bias=config.conv_bias,
        kernel_init=kaiming_normal,
        bias_init=bias_init(config, size * size * c_in),
        dtype=compute_dtype(config),
        param_dtype=param_dtype(config),
        rngs=rngs,
    )


def batch_norm(config: ResNetConfig, num_features: int) -> BatchNorm:
    return BatchNorm(
        num_features,
        momentum=config.batch_norm_momentum,
        epsilon=config.batch_norm_epsilon,
        dtype=compute_dtype(config),
        param_dtype=param_dtype(config),
    )


def linear(config: ResNetConfig, c_in: int, c_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        c_in,
        c_out,
        kernel_init=torch_uniform if config.init is Init.TORCH else kaiming_normal,
        bias_init=bias_init(config, c_in),
        dtype=param_dtype(config),  # the loss is never computed in bfloat16
        param_dtype=param_dtype(config),
        rngs=rngs,
    )


def bias_init(config: ResNetConfig, fan_in: int) -> nnx.Initializer:
    """Zero, or as PyTorch's layers do it: uniform between -+1/sqrt(fan in)."""
    if config.init is Init.KAIMING:
        return nnx.initializers.zeros_init()
    bound = fan_in**-0.5

    def uniform(key: Array, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return uniform


def compute_dtype(config: ResNetConfig) -> jnp.dtype:
    return jnp.dtype(config.dtype.value)


def param_dtype(config: ResNetConfig) -> jnp.dtype:
    """Parameters and statistics keep float32 under bfloat16."""
    return jnp.dtype("float64" if config.dtype is DType.FLOAT64 else "float32")


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """A module as its structure, its parameters and its running statistics."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def abstract(config: ResNetConfig) -> tuple[nnx.GraphDef, Tree, Tree]:
    """A network's structure, with shapes and types in the place of arrays."""
    return split(nnx.eval_shape(lambda: ResNet(config, rngs=keys(0))))
