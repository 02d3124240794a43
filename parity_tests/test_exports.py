"""Claim: what is exported loads in the original's own class, and either way the logits are equal.

Every layout in both directions: the original's state dict is read by `from_torch`, whose network
must give the original's logits; what `to_torch` writes is loaded by a second original with
`strict=True`, which must have the first one's numbers. In evaluation mode, in float64; the largest
difference over the largest logit is at most 2.2e-15 as measured, and the tolerance is 1e-12.

transformers' and timm's networks are their own code, where it is installed (`test_originals.py`
has torchvision's); the others are in `others.py`, written as the originals are.
"""

import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import flax_resnet
from flax_resnet.config import ChannelPad, ResNetConfig, Shortcut, Stages, Stride
from flax_resnet.weights.layouts import Layout
from parity_tests.others import (
    Akamaster,
    Kuangliu,
    KuangliuBlock,
    KuangliuBottleneck,
    Tanjeffreyz,
    randomize,
)
from parity_tests.pair import torch

HOW = "pip install 'flax-resnet[peers]', and --no-deps timm==1.0.31 torchvision==0.28.0"
TOLERANCE = 1e-12

Told = dict[str, Any]
A: Told = {"shortcut": Shortcut.A}
PLAIN: Told = {"shortcut": Shortcut.PLAIN}
B: Told = {"shortcut": Shortcut.B}


def peer(name: str) -> Any:
    """A module of transformers or timm; skips where it is not installed."""
    # Both import torchvision where it is there, whose operators are of another build of torch.
    module = "torchvision._meta_registrations"
    sys.modules.setdefault(module, types.ModuleType(module))
    pytest.importorskip(name.partition(".")[0], reason=f"{name}: {HOW}")
    return importlib.import_module(name)


def huggingface_model(depth: int, *, in_first: bool = False) -> Any:
    """transformers' own, with the stride on the first 1x1 convolution or on the 3x3."""
    transformers = peer("transformers")
    blocks, kind = {18: ((2, 2, 2, 2), "basic"), 50: ((3, 4, 6, 3), "bottleneck")}[depth]
    expansion = 4 if kind == "bottleneck" else 1
    config = transformers.ResNetConfig(
        depths=list(blocks),
        layer_type=kind,
        hidden_sizes=[expansion * width for width in (64, 128, 256, 512)],
        num_labels=10,
        downsample_in_bottleneck=in_first,
    )
    return transformers.ResNetForImageClassification(config)


def timm(depth: int) -> Any:
    return peer("timm").create_model(f"resnet{depth}", num_classes=10)


def akamaster(option: str, classifier: str = "linear") -> Callable[[], Any]:
    return functools.partial(Akamaster, 1, option, classifier)


SMALL = {
    "akamaster-A": (Layout.AKAMASTER, akamaster("A"), A),
    "akamaster-B": (Layout.AKAMASTER, akamaster("B"), {}),
    "akamaster_fc-A": (
        Layout.AKAMASTER_FC,
        akamaster("A", "fc"),
        A | {"channel_pad": ChannelPad.CENTRE},
    ),
    "akamaster_fc-B": (Layout.AKAMASTER_FC, akamaster("B", "fc"), {}),
    "tanjeffreyz-plain": (Layout.TANJEFFREYZ, lambda: Tanjeffreyz((1, 1, 1), None), PLAIN),
    "tanjeffreyz-A": (Layout.TANJEFFREYZ, lambda: Tanjeffreyz((1, 1, 1), "A"), A),
    "tanjeffreyz-B": (Layout.TANJEFFREYZ, lambda: Tanjeffreyz((1, 1, 1), "B"), B),
}
FOUR_2 = (2, 2, 2, 2)
LARGE = {
    "kuangliu-18": (Layout.KUANGLIU, lambda: Kuangliu(KuangliuBlock, FOUR_2), {}),
    "kuangliu-50": (Layout.KUANGLIU, lambda: Kuangliu(KuangliuBottleneck, (3, 4, 6, 3)), {}),
    "tanjeffreyz-18-plain": (Layout.TANJEFFREYZ, lambda: Tanjeffreyz(FOUR_2, None), PLAIN),
    "tanjeffreyz-18-A": (Layout.TANJEFFREYZ, lambda: Tanjeffreyz(FOUR_2, "A"), A),
    "tanjeffreyz-34-B": (Layout.TANJEFFREYZ, lambda: Tanjeffreyz((3, 4, 6, 3), "B"), B),
    "timm-18": (Layout.TORCHVISION, lambda: timm(18), {}),
    "timm-50": (Layout.TORCHVISION, lambda: timm(50), {}),
    "huggingface-18": (Layout.HUGGINGFACE, lambda: huggingface_model(18), {}),
    "huggingface-50": (Layout.HUGGINGFACE, lambda: huggingface_model(50), {}),
    "huggingface-50-in-first": (
        Layout.HUGGINGFACE,
        lambda: huggingface_model(50, in_first=True),
        {"stride": Stride.CONV1X1},
    ),
}


def logits_of(theirs: Any, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = theirs(torch.tensor(image).permute(0, 3, 1, 2))
    return getattr(found, "logits", found).numpy()


def difference(theirs: Any, ours: flax_resnet.ResNet, size: int) -> float:
    """Largest difference of the logits over the largest logit."""
    shape = (2, size, size, ours.architecture.image_channels)
    image = np.random.default_rng(0).normal(size=shape)
    expected = logits_of(theirs, image)
    found = np.asarray(ours(jnp.asarray(image)))  # compiled layer by layer, once for all networks
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check(layout: Layout, make: Callable[[], Any], told: Told, size: int) -> flax_resnet.ResNet:
    """Both ways. What was read comes back."""
    theirs = randomize(make())
    ours = flax_resnet.from_torch(theirs.state_dict(), **told)
    assert difference(theirs, ours, size) <= TOLERANCE
    other = randomize(make(), seed=1)
    back = flax_resnet.to_torch(ours, layout=layout, prefix="")
    unused = {key for key in back if "conv_downsample" in key and told != B}
    other.load_state_dict(back, strict=True)
    for key, value in theirs.state_dict().items():
        assert key in unused or torch.equal(other.state_dict()[key], value), key
    return ours


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name: str) -> None:
    check(*SMALL[name], size=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_large_networks(name: str) -> None:
    """The odd size puts the max-pool's padding and the strides to the test."""
    layout, make, told = LARGE[name]
    ours = check(layout, make, told, size=32 if name.startswith("kuangliu") else 65)
    if layout is Layout.TANJEFFREYZ:
        depth = int(name.split("-")[1])
        config = ResNetConfig.tanjeffreyz(depth, told["shortcut"], stages=Stages.IMAGENET)
        assert ours.architecture == config.architecture


def test_akamasters_trainer_gets_its_prefix() -> None:
    """It resumes within DataParallel, as its published files are; its bare network is without."""
    theirs = Akamaster(1, "A")
    ours = flax_resnet.from_torch(theirs.state_dict(), **A)
    torch.nn.DataParallel(theirs).load_state_dict(
        flax_resnet.to_torch(ours, layout=Layout.AKAMASTER), strict=True
    )
    with pytest.raises(RuntimeError, match=r"module\.conv1"):
        theirs.load_state_dict(flax_resnet.to_torch(ours, layout=Layout.AKAMASTER), strict=True)
