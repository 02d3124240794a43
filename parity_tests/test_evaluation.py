"""Claim: in evaluation mode every block's output is PyTorch's, in float64 to 1e-13, and in float32
no further from the float64 truth than PyTorch's own, times 2.

Weights and running statistics are random. Differences are relative to the largest value of the
stem's, block's or head's output. float64: measured at most 3.5e-14, and 1.2e-13 in the plain
network of depth 110, whose tolerance is 1e-12: no shortcut carries the signal past the rounding of
its blocks, and PyTorch's outputs differ from PyTorch's own by 9e-14 when the image changes in its
last bit. The mutants below differ by 9e-11 and more.

float32: either side's distance from the truth is the root mean square, over 20 seeds of weights and
images and over all elements, of its error. Single seeds and largest errors scatter; this average of
400 elements (logits) to 655,360 (blocks) does not. Ours over theirs, measured: 1.02 to 1.38 at the
blocks, 1.4 to 1.7 at the logits. Operands cut to TF32, as GPUs do unasked, make it 470 and more.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from flax_resnet import resnet
from flax_resnet.config import DType, ResNetConfig, Shortcut
from flax_resnet.nn.batch_norm import BatchNorm
from flax_resnet.nn.cpu import compiler_options
from flax_resnet.nn.pooling import MaxPool
from parity_tests.mutants import one_by_default
from parity_tests.pair import (
    LARGE,
    QUICK_LARGE,
    Pair,
    images,
    make_pair,
    relative,
    to_torch,
    torch,
)

SEEDS = range(20)
Forward = Callable[[Any, Any, jax.Array], list[jax.Array]]


def make_forward(pair: Pair, *, compiled: bool) -> Forward:
    """(params, batch_stats, image) to the outputs of stem, blocks and head, in PyTorch's layout."""

    def outputs(params: Any, batch_stats: Any, x: jax.Array) -> list[jax.Array]:
        model = nnx.merge(pair.graphdef, params, batch_stats, copy=True)
        model.eval()
        found = []
        for _, layer in model.layers():
            x = layer(x)
            found.append(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x)
        return found

    return jax.jit(outputs, compiler_options=compiler_options()) if compiled else outputs


@torch.no_grad()
def theirs(twin: torch.nn.Module, image: np.ndarray) -> list[np.ndarray]:
    """The same from PyTorch."""
    x = to_torch(image)
    found = []
    for _, layer in twin.eval().layers():
        x = layer(x)
        found.append(x.numpy())
    return found


def differences(config: ResNetConfig) -> list[float]:
    """At stem, blocks and logits."""
    pair, image = make_pair(config), images(2, channels=config.image_channels)
    forward = make_forward(pair, compiled=config.depth == 20)
    ours = forward(pair.params, pair.batch_stats, jnp.asarray(image))
    expected = theirs(pair.twin, image)
    assert len(ours) == len(expected) == sum(config.architecture.blocks) + 2
    return list(map(relative, ours, expected))


QUICK_110 = (Shortcut.PLAIN, Shortcut.A)


@pytest.mark.parametrize(
    ("family", "depth", "shortcut"),
    [
        pytest.param(
            family,
            depth,
            shortcut,
            id=f"{family.__name__}-{depth}-{shortcut.value}",
            marks=(
                () if depth == 20 or (depth == 110 and shortcut in QUICK_110) else pytest.mark.slow
            ),
        )
        for family, depth in (
            (ResNetConfig.paper, 20),
            (ResNetConfig.tanjeffreyz, 20),
            (ResNetConfig.paper, 56),
            (ResNetConfig.paper, 110),
        )
        for shortcut in Shortcut
    ],
)
def test_every_block_is_pytorchs_in_float64(
    family: Callable, depth: int, shortcut: Shortcut
) -> None:
    tolerance = 1e-12 if (depth, shortcut) == (110, Shortcut.PLAIN) else 1e-13
    found = differences(family(depth, shortcut, dtype=DType.FLOAT64))
    assert max(found) <= tolerance


def test_every_block_is_pytorchs_with_channels_padded_in_the_centre() -> None:
    assert max(differences(ResNetConfig.akamaster(20, dtype=DType.FLOAT64))) <= 1e-13


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in QUICK_LARGE else pytest.mark.slow) for x in LARGE],
)
def test_every_block_of_a_large_network_is_pytorchs_in_float64(name: str) -> None:
    assert max(differences(LARGE[name])) <= 1e-13


def distances(config: ResNetConfig) -> np.ndarray:
    """At stem, blocks and logits: our float32's distance from the truth over PyTorch's."""
    forward = make_forward(make_pair(config), compiled=True)
    squares = []
    for seed in SEEDS:
        pair, image = make_pair(config, seed), images(2, seed, "float32")
        ours = forward(pair.params, pair.batch_stats, jnp.asarray(image))
        expected = theirs(pair.twin, image)
        truth = theirs(pair.twin.double(), image.astype("float64"))
        squares.append(
            [
                [np.square((x - t) / np.abs(t).max()).mean() for t, x in zip(truth, y, strict=True)]
                for y in (ours, expected)
            ]
        )
    ours_squared, theirs_squared = np.mean(squares, 0)
    return np.sqrt(ours_squared / theirs_squared)


@pytest.mark.parametrize(
    ("depth", "shortcut"),
    [
        pytest.param(8, Shortcut.C, id="8-C"),
        pytest.param(20, Shortcut.C, id="20-C", marks=pytest.mark.slow),
        pytest.param(56, Shortcut.A, id="56-A", marks=pytest.mark.slow),
    ],
)
def test_float32_is_as_near_the_truth_as_pytorchs(depth: int, shortcut: Shortcut) -> None:
    ratio = distances(ResNetConfig.paper(depth, shortcut))
    assert ratio.max() <= 2


def test_tf32_operands_are_further_from_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    call = nnx.Conv.__call__

    def mutant(self: nnx.Conv, x: jax.Array) -> jax.Array:
        return call(self, lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10))

    monkeypatch.setattr(nnx.Conv, "__call__", mutant)
    assert distances(ResNetConfig.paper(8)).min() > 100


def other_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong in its sixth digit."""
    epsilon = 1.00001e-5
    monkeypatch.setattr(
        resnet,
        "BatchNorm",
        lambda *args, **kwargs: BatchNorm(*args, **kwargs | {"epsilon": epsilon}),
    )


def batch_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """tanjeffreyz's own fault: it forgets evaluation mode."""
    monkeypatch.setattr(resnet.ResNet, "eval", lambda self: None)


def float32_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `nnx.BatchNorm` keeps, whatever its `param_dtype`."""
    call = BatchNorm.__call__

    def mutant(self: BatchNorm, x: jax.Array, **ending: Any) -> jax.Array:
        for statistic in (self.mean, self.var):
            statistic[...] = statistic[...].astype("float32").astype("float64")
        return call(self, x, **ending)

    monkeypatch.setattr(BatchNorm, "__call__", mutant)


@pytest.mark.parametrize(
    "mutate", one_by_default([other_epsilon, batch_statistics, float32_statistics])
)
def test_a_mutant_differs_at_every_block(mutate: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    assert min(differences(ResNetConfig.paper(8, dtype=DType.FLOAT64))) > 1e-11


def test_a_mutant_block_is_found_by_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 6th of 9 blocks is another function: all outputs before its own are right."""
    init = resnet.ResNet.__init__

    def mutant(self: resnet.ResNet, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.stages[1][2].bn2.epsilon = 2e-5

    monkeypatch.setattr(resnet.ResNet, "__init__", mutant)
    found = np.array(differences(ResNetConfig.paper(20, dtype=DType.FLOAT64)))
    np.testing.assert_array_equal(found > 1e-13, np.arange(11) >= 6)


def same_max_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's padding: at an even size (0, 1)."""

    def mutant(self: MaxPool, x: jax.Array) -> jax.Array:
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")

    monkeypatch.setattr(MaxPool, "__call__", mutant)


def stride_on_the_1x1(monkeypatch: pytest.MonkeyPatch) -> None:
    init = resnet.Bottleneck.__init__

    def mutant(self: resnet.Bottleneck, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.conv1.strides, self.conv2.strides = self.conv2.strides, self.conv1.strides

    monkeypatch.setattr(resnet.Bottleneck, "__init__", mutant)


def relu_before_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(self: resnet.Bottleneck, x: jax.Array) -> jax.Array:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x), relu=True)), relu=True)
        return nnx.relu(self.bn3(self.conv3(y), relu=True) + self.shortcut(x))

    monkeypatch.setattr(resnet.Bottleneck, "__call__", mutant)


def tensorflows_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        resnet, "BatchNorm", lambda *args, **kwargs: BatchNorm(*args, **kwargs | {"epsilon": 1e-3})
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutate",
    [same_max_pool, stride_on_the_1x1, relu_before_the_sum, tensorflows_epsilon],
    ids=lambda mutate: mutate.__name__,
)
def test_a_mutant_of_a_large_network_differs(
    mutate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By so much in the logits that float32 would show it, too."""
    mutate(monkeypatch)
    found = differences(LARGE["50-B, stride on 3x3"])
    assert found[-1] > 1e-3
