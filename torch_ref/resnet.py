"""Residual networks for CIFAR-10: He, Zhang, Ren and Sun 2015, section 4.2.

Lay `flax_resnet/resnet.py` beside it: the two differ in `nn` against `nnx`, and in NCHW against
NHWC. Only the configuration is shared, so that a default has one home.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flax_resnet.config import (
    ChannelPad,
    DType,
    Init,
    Projection,
    ProjectionInit,
    ResNetConfig,
    Shortcut,
    Stem,
)

Layer = Callable[[Tensor], Tensor]


class ResNet(nn.Module):
    """Stem, three stages of n blocks with 16, 32 and 64 filters, global average, classifier.

    Args:
        config: depth 6n + 2, kind of shortcut and the other options; its compute type must be
            float32 or float64 (bfloat16 is autocast's business).

    Attributes:
        architecture: what a checkpoint of this network fixes.

    Raises:
        ConfigError: the depth is not 6n + 2.
    """

    def __init__(self, config: ResNetConfig):
        super().__init__()
        config.validate()
        self.architecture = config.architecture
        self.conv1 = conv3x3(config, 3, 16)
        self.bn1 = batch_norm(config, 16) if config.stem is Stem.CONV_BN_RELU else None
        self.stages = nn.ModuleList()
        c_in = 16
        for c_out in (16, 32, 64):
            stage = nn.ModuleList()
            for i in range(config.blocks_per_stage):
                stride = 2 if i == 0 and c_out > 16 else 1
                stage.append(BasicBlock(config, c_in, c_out, stride))
                c_in = c_out
            self.stages.append(stage)
        self.fc = linear(config, 64, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, classes) of a batch of preprocessed images (b, 3, h, w)."""
        for _, layer in self.layers():
            x = layer(x)
        return x

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
        return x if self.bn1 is None else F.relu(self.bn1(x))

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: relu(residual(x) + shortcut(x)) (paper, figure 2)."""

    def __init__(self, config: ResNetConfig, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(config, c_in, c_out, stride)
        self.bn1 = batch_norm(config, c_out)
        self.conv2 = conv3x3(config, c_out, c_out)
        self.bn2 = batch_norm(config, c_out)
        self.shortcut = make_shortcut(config, c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y) if self.shortcut is None else F.relu(y + self.shortcut(x))


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


def conv3x3(config: ResNetConfig, c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(
        c_in,
        c_out,
        3,
        stride=stride,
        padding=1,
        bias=config.conv_bias,
        dtype=param_dtype(config),
    )
    kaiming_normal(conv)
    if config.init is Init.KAIMING:
        zero_bias(conv)
    return conv


def batch_norm(config: ResNetConfig, num_features: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(num_features, dtype=param_dtype(config))


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
