"""The residual networks of He, Zhang, Ren and Sun 2015: table 1 (ImageNet), section 4.2 (CIFAR).

Lay `flax_resnet/resnet.py` beside it: the two differ in `nn` against `nnx`, and in NCHW against
NHWC. Only the configuration is shared, so that a default has one home.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

Layer = Callable[[Tensor], Tensor]


class ResNet(nn.Module):
    """Stem, stages of blocks, global average, classifier.

    Args:
        config: depth, kind of shortcut and the other options; its compute type must be float32 or
            float64 (bfloat16 is autocast's business).

    Attributes:
        architecture: what a checkpoint of this network fixes.

    Raises:
        ConfigError: there is no such network.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__()
        self.architecture = config.architecture
        is_large = config.stem in (Stem.CONV7_BN_RELU_POOL, Stem.CONV7_POOL)
        has_bn = config.stem in (Stem.CONV_BN_RELU, Stem.CONV7_BN_RELU_POOL)
        size, stride = (7, 2) if is_large else (3, 1)
        c_in, *_ = self.architecture.widths
        self.conv1 = conv(config, config.image_channels, c_in, size, stride)
        self.bn1 = batch_norm(config, c_in) if has_bn else None
        self.max_pool = nn.MaxPool2d(3, stride=2, padding=1) if is_large else None
        self.stages = nn.ModuleList()
        block = BLOCKS[self.architecture.block]
        for s, width in enumerate(self.architecture.widths):
            stage = nn.ModuleList()
            for i in range(self.architecture.blocks[s]):
                stride = 2 if i == 0 and s > 0 else 1
                stage.append(block(config, c_in, width, stride))
                c_in = width * block.expansion
            self.stages.append(stage)
        self.fc = linear(config, c_in, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, classes) of a batch of preprocessed images (b, c, h, w).

        Raises:
            ConfigError: the images have another number of channels, or no pixels.
        """
        return self.head(self.features(x)[-1])

    def features(self, x: Tensor) -> list[Tensor]:
        """What a batch of preprocessed images (b, c, h, w) is after the stem, and after each stage.

        Raises:
            ConfigError: the images have another number of channels, or no pixels.
        """
        check_images(self.architecture, x.shape[1], x.shape[2:])
        found = [self.stem(x)]
        for stage in self.stages:
            x = found[-1]
            for block in stage.children():
                x = block(x)
            found.append(x)
        return found

    def layers(self) -> list[tuple[str, Layer]]:
        """What x passes through, by name: stem, every block, head."""
        blocks = [
            (f"stages.{s}.{b}", block)
            for s, stage in enumerate(self.stages)
            for b, block in enumerate(stage.children())
        ]
        return [("stem", self.stem), *blocks, ("head", self.head)]

    def stem(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x if self.bn1 is None else F.relu(self.bn1(x))
        return x if self.max_pool is None else self.max_pool(x)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def check_images(architecture: Architecture, channels: int, size: tuple[int, ...]) -> None:
    """Raises ConfigError unless the network takes images of so many channels and pixels."""
    if channels != architecture.image_channels or min(size) < 1:
        raise ConfigError(
            f"images must have {architecture.image_channels} channel(s) and at least one pixel, "
            f"got {channels} channel(s) of {' x '.join(map(str, size))} pixels"
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: relu(residual(x) + shortcut(x)) (paper, figure 2)."""

    expansion = 1  # output channels over `width`

    def __init__(self, config: ResNetConfig, c_in: int, width: int, stride: int):
        super().__init__()
        c_out = width * self.expansion
        self.conv1 = conv(config, c_in, width, 3, stride)
        self.bn1 = batch_norm(config, width)
        self.conv2 = conv(config, width, c_out, 3)
        self.bn2 = batch_norm(config, c_out)
        self.shortcut = make_shortcut(config, c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y) if self.shortcut is None else F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut (paper, figure 5, right)."""

    expansion = 4

    def __init__(self, config: ResNetConfig, c_in: int, width: int, stride: int):
        super().__init__()
        c_out = width * self.expansion
        strides = (stride, 1) if config.stride is Stride.CONV1X1 else (1, stride)
        self.conv1 = conv(config, c_in, width, 1, strides[0])
        self.bn1 = batch_norm(config, width)
        self.conv2 = conv(config, width, width, 3, strides[1])
        self.bn2 = batch_norm(config, width)
        self.conv3 = conv(config, width, c_out, 1)
        self.bn3 = batch_norm(config, c_out)
        self.shortcut = make_shortcut(config, c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y) if self.shortcut is None else F.relu(y + self.shortcut(x))


BLOCKS = {Block.BASIC: BasicBlock, Block.BOTTLENECK: Bottleneck}


class ZeroPad(nn.Module):
    """Option A: every stride-th pixel, and new channels that are zero."""

    def __init__(self, channel_pad: ChannelPad, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride = stride
        new = c_out - c_in
        before = new // 2 if channel_pad is ChannelPad.CENTRE else 0
        self.pad = (before, new - before)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, *self.pad))


class Projection1x1(nn.Module):
    """Options B and C: a 1x1 convolution, with BatchNorm or (tanjeffreyz) with a bias."""

    def __init__(self, config: ResNetConfig, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(
            c_in,
            c_out,
            1,
            stride=stride,
            bias=config.projection is Projection.CONV_BIAS,
            dtype=param_dtype(config),
        )
        if config.projection_init is ProjectionInit.AVERAGE:
            nn.init.constant_(self.conv.weight, 1 / c_in)
        else:
            kaiming_normal(self.conv)
        zero_bias(self.conv)
        has_bn = config.projection is Projection.CONV_BN
        self.bn = batch_norm(config, c_out) if has_bn else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.bn is None else self.bn(x)


def make_shortcut(config: ResNetConfig, c_in: int, c_out: int, stride: int) -> nn.Module | None:
    """What joins a block's input to its residual; None in a plain network."""
    same_shape = c_in == c_out and stride == 1
    match config.shortcut:
        case Shortcut.PLAIN:
            return None
        case Shortcut.A | Shortcut.B if same_shape:
            return nn.Identity()
        case Shortcut.A:
            return ZeroPad(config.channel_pad, c_in, c_out, stride)
        case Shortcut.B | Shortcut.C:
            return Projection1x1(config, c_in, c_out, stride)


def conv(config: ResNetConfig, c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(
        c_in,
        c_out,
        size,
        stride=stride,
        padding=size // 2,
        bias=config.conv_bias,
        dtype=param_dtype(config),
    )
    kaiming_normal(layer)
    if config.init is Init.KAIMING:
        zero_bias(layer)
    return layer


def batch_norm(config: ResNetConfig, num_features: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(
        num_features,
        momentum=config.batch_norm_momentum,
        eps=config.batch_norm_epsilon,
        dtype=param_dtype(config),
    )


def linear(config: ResNetConfig, c_in: int, c_out: int) -> nn.Linear:
    fc = nn.Linear(c_in, c_out, dtype=param_dtype(config))
    if config.init is Init.KAIMING:
        kaiming_normal(fc)
        zero_bias(fc)
    return fc


def kaiming_normal(layer: nn.Conv2d | nn.Linear) -> None:
    """Kernel normal with deviation sqrt(2 / fan in) (He et al. 2015b)."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def zero_bias(layer: nn.Conv2d | nn.Linear) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def param_dtype(config: ResNetConfig) -> torch.dtype:
    return torch.float64 if config.dtype is DType.FLOAT64 else torch.float32
