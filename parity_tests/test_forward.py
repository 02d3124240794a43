"""Claim: in evaluation mode the Flax networks give PyTorch's logits, for every shortcut and depth.

float64 to 1e-12 relative: rounding alone gives about 1e-15, the smallest mutant below 1e-3.
float32 to 1e-4: what rounding does to 110 layers, measured at 2e-6 and below.
"""

import jax
import pytest

from flax_resnet import resnet
from flax_resnet.batch_norm import BatchNorm
from flax_resnet.config import ChannelPad, DType, ResNetConfig, Shortcut
from flax_resnet.resnet import ZeroPad
from parity_tests.pair import Pair, images, make_pair, relative, to_torch, torch

TOLERANCE = {DType.FLOAT64: 1e-12, DType.FLOAT32: 1e-4}


def difference(pair: Pair, batch_size: int = 2) -> float:
    image = images(batch_size, dtype=pair.config.dtype.value)
    model = pair.model()
    model.eval()
    with torch.no_grad():
        theirs = pair.twin.eval()(to_torch(image))
    return relative(jax.jit(lambda x: model(x))(image), theirs)


@pytest.mark.parametrize("dtype", [DType.FLOAT64, DType.FLOAT32], ids=lambda d: d.value)
@pytest.mark.parametrize("shortcut", Shortcut, ids=lambda s: s.value)
@pytest.mark.parametrize("depth", [8, 20, 56, 110])
def test_logits_are_pytorchs(depth: int, shortcut: Shortcut, dtype: DType) -> None:
    pair = make_pair(ResNetConfig.paper(depth, shortcut, dtype=dtype))
    assert difference(pair) <= TOLERANCE[dtype]


@pytest.mark.parametrize("shortcut", Shortcut, ids=lambda s: s.value)
@pytest.mark.parametrize("family", [ResNetConfig.reference, ResNetConfig.akamaster])
def test_logits_of_the_other_families(family: type, shortcut: Shortcut) -> None:
    pair = make_pair(family(20, shortcut, dtype=DType.FLOAT64))
    assert difference(pair) <= TOLERANCE[DType.FLOAT64]


def same_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    conv3x3 = resnet.conv3x3

    def mutant(*args: object, **kwargs: object) -> object:
        conv = conv3x3(*args, **kwargs)
        conv.padding = "SAME"
        return conv

    monkeypatch.setattr(resnet, "conv3x3", mutant)


def other_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "BatchNorm", lambda *a, **k: BatchNorm(*a, epsilon=2e-3, **k))


def other_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    centre = lambda _, *sizes: ZeroPad(ChannelPad.CENTRE, *sizes)  # noqa: E731
    monkeypatch.setattr(resnet, "ZeroPad", centre)


def other_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(self: ZeroPad, x: jax.Array) -> jax.Array:
        x = x[:, self.stride - 1 :: self.stride, self.stride - 1 :: self.stride]
        return jax.numpy.pad(x, ((0, 0), (0, 0), (0, 0), self.pad))

    monkeypatch.setattr(ZeroPad, "__call__", mutant)


def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(self: resnet.BasicBlock, x: jax.Array) -> jax.Array:
        y = self.bn1(jax.nn.relu(self.conv1(x)))
        return resnet.add_relu(self.bn2(self.conv2(y)), self.shortcut(x))

    monkeypatch.setattr(resnet.BasicBlock, "__call__", mutant)


@pytest.mark.parametrize(
    "mutate", [same_pad, other_epsilon, other_channels, other_pixels, other_order]
)
def test_a_mutant_fails(mutate, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    pair = make_pair(ResNetConfig.paper(8, Shortcut.A, dtype=DType.FLOAT64))
    assert difference(pair) > 1e-4
