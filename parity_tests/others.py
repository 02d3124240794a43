"""Networks as other projects define them: their modules, names and order, nothing of ours.

What of the code of kuangliu/pytorch-cifar (models/resnet.py), akamaster/pytorch_resnet_cifar10
(resnet.py) and tanjeffreyz/deep-residual-learning makes up a state dict and the logits is written
here anew.
"""

import importlib
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest

from parity_tests.pair import torch

nn, F = torch.nn, torch.nn.functional


def torchvision(module: str) -> Any:
    """A module of torchvision itself, such as "models"; skips the test where it is not."""
    # Its compiled operators are of another build of torch, and what is used here needs none.
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
    how = "pip install --no-deps torchvision==0.28.0, or the extra `peers`"
    pytest.importorskip("torchvision", reason=f"torchvision's own code: {how}")
    return importlib.import_module(f"torchvision.{module}")


def conv(c_in: int, c_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, stride=stride, padding=size // 2, bias=False)


# --- kuangliu/pytorch-cifar -----------------------------------------------------------------------


class KuangliuBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(in_planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            projection = conv(in_planes, planes, 1, stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class KuangliuBottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        out = 4 * planes
        self.conv1, self.bn1 = conv(in_planes, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, out, 1), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != out:
            self.shortcut = nn.Sequential(conv(in_planes, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class Kuangliu(nn.Module):
    """ResNet18 to 152: images of 32x32 pixels."""

    def __init__(self, block: type, num_blocks: Sequence[int], num_classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 3), nn.BatchNorm2d(64)
        c_in = 64
        for i, (planes, n) in enumerate(zip((64, 128, 256, 512), num_blocks, strict=True), 1):
            layer = []
            for stride in [1 if i == 1 else 2] + [1] * (n - 1):
                layer.append(block(c_in, planes, stride))
                c_in = planes * block.expansion
            setattr(self, f"layer{i}", nn.Sequential(*layer))
        self.linear = nn.Linear(c_in, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(F.avg_pool2d(out, 4).flatten(1))


# --- akamaster/pytorch_resnet_cifar10 -------------------------------------------------------------


class LambdaLayer(nn.Module):
    def __init__(self, planes: int):
        super().__init__()
        self.planes = planes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pad = self.planes // 4
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad), "constant", 0)


class AkamasterBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int, option: str):
        super().__init__()
        self.conv1, self.bn1 = conv(in_planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_planes != planes:
            projection = nn.Sequential(conv(in_planes, planes, 1, stride), nn.BatchNorm2d(planes))
            self.shortcut = LambdaLayer(planes) if option == "A" else projection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Akamaster(nn.Module):
    """resnet20 to 1202.

    Args:
        classifier: `linear` is akamaster's own; many forks say `fc`.
    """

    def __init__(self, n: int, option: str, classifier: str = "linear"):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 3), nn.BatchNorm2d(16)
        in_planes, self.classifier = 16, classifier
        for i, planes in enumerate((16, 32, 64), 1):
            layer = []
            for stride in [1 if i == 1 else 2] + [1] * (n - 1):
                layer.append(AkamasterBlock(in_planes, planes, stride, option))
                in_planes = planes
            setattr(self, f"layer{i}", nn.Sequential(*layer))
        setattr(self, classifier, nn.Linear(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return getattr(self, self.classifier)(F.avg_pool2d(out, out.size()[3]).flatten(1))


# --- tanjeffreyz/deep-residual-learning -----------------------------------------------------------


class TanjeffreyzBlock(nn.Module):
    """With a shortcut of option A or B, or None: plain. The projection is there in any case."""

    def __init__(self, c_in: int, c_out: int, option: str | None):
        super().__init__()
        self.option, self.is_down, stride = option, c_in != c_out, 1 + (c_in != c_out)
        self.model = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1),
            nn.BatchNorm2d(c_out),
        )
        if self.is_down:
            self.conv_downsample = nn.Conv2d(c_in, c_out, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.model(x)
        if self.option is None:
            return F.relu(y)
        if self.is_down and self.option == "A":
            x = F.max_pool2d(x, 1, 2)
            x = torch.cat([x, torch.zeros_like(x)], dim=1)
        elif self.is_down:
            x = self.conv_downsample(x)
        return F.relu(y + x)


class Tanjeffreyz(nn.Module):
    """Its CifarResNet, or with four stages its ImageNetResNet, whose images have one channel."""

    def __init__(self, num_blocks: Sequence[int], option: str | None):
        super().__init__()
        is_large = len(num_blocks) == 4
        c_in = 64 if is_large else 16
        if is_large:
            modules: list[nn.Module] = [nn.Conv2d(1, c_in, 7, stride=2, padding=3)]
            modules.append(nn.MaxPool2d(3, stride=2, padding=1))
        else:
            modules = [nn.Conv2d(3, c_in, 3, padding=1)]
        for i, n in enumerate(num_blocks):
            for b in range(n):
                c_out = 2 * c_in if i > 0 and b == 0 else c_in
                modules.append(TanjeffreyzBlock(c_in, c_out, option))
                c_in = c_out
        head = nn.Module()
        layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(c_in, 1000 if is_large else 10)]
        head.model = nn.Sequential(*layers)
        head.forward = head.model.forward
        self.model = nn.Sequential(*modules, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64, in evaluation mode, with BatchNorms of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model
