"""Claim: on dyadic weights and images logits and every gradient are PyTorch's to the last bit.

No tolerance. Kernels are +-1 at few taps, BatchNorm divides by a power of two (var + epsilon is
4**a exactly) and all else is a small integer, so that every intermediate value is a multiple of a
power of two and a few bits wide: about 30 in the results at depth 110, of float64's 53. Then
no order of summation changes a bit, and two programs agree exactly or compute different functions.
Many sums are exactly 0, which puts the gradient of relu at 0 to the test too.

float32 has 24 bits. They suffice to depth 56 (22 bits), and at depth 110 for A and B with one tap
per channel; plain and C need more taps there lest the signal dies out, hence more bits. That
nothing was rounded is tested: the float32 results are the float64 ones.

Depth 20 is compiled as a whole, as in training. Deeper networks run operation by operation, which
spares minutes of compilation.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_resnet import resnet
from flax_resnet.config import DType, ResNetConfig, Shortcut, Stem
from flax_resnet.nn.batch_norm import BatchNorm
from flax_resnet.nn.cpu import compiler_options
from flax_resnet.resnet import abstract
from flax_resnet.weights.trees import tree_to_torch
from parity_tests.mutants import one_by_default
from parity_tests.pair import LARGE, Pair, make_twin, to_torch, torch

Arrays = dict[str, np.ndarray]
EPSILON = 1e-5

PAPERS = {
    "plain": ResNetConfig.paper(shortcut=Shortcut.PLAIN),
    "A": ResNetConfig.paper(),
    "A-centre": ResNetConfig.akamaster(),
    "B": ResNetConfig.paper(shortcut=Shortcut.B),
    "C": ResNetConfig.paper(shortcut=Shortcut.C),
}
NETWORKS = PAPERS | {
    "tanjeffreyz-A": ResNetConfig.tanjeffreyz(),
    "tanjeffreyz-B": ResNetConfig.tanjeffreyz(shortcut=Shortcut.B),
    "tanjeffreyz-C": ResNetConfig.tanjeffreyz(shortcut=Shortcut.C),
}


# The slow tests have all networks at more depths.
QUICK_FLOAT64 = [(20, network) for network in (*PAPERS, "tanjeffreyz-B")]
QUICK_FLOAT32 = [(20, "A"), (20, "C"), (20, "tanjeffreyz-B")]


def dyadic_pair(config: ResNetConfig, taps: int | None = None) -> Pair:
    """Weights that are exact in few bits; `taps` per output channel, but one in a second kernel.

    By default as many as keep the signal alive: without a shortcut more of them.
    """
    taps = taps or (7 if config.shortcut is Shortcut.PLAIN else 2)
    rng = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> jax.Array:
        module, name = path[-2].key, path[-1].key
        sign = rng.choice([-1, 1], like.shape)
        a = np.arange(like.shape[-1]) % 3 - 1.0
        if name == "kernel" and module != "fc":
            height, width, c_in, c_out = like.shape
            value = np.zeros(like.shape)
            for _ in range(1 if module == "conv2" else taps):
                row, column = rng.integers(height, size=c_out), rng.integers(width, size=c_out)
                value[row, column, rng.permutation(c_out) % c_in, range(c_out)] = 1
            value *= sign
        elif name == "scale":
            value = sign * 2**a
        elif name == "var":
            value = 4**a - EPSILON
            assert np.array_equal(value.astype(like.dtype) + like.dtype.type(EPSILON), 4**a)
        else:
            value = rng.integers(-1, 2, like.shape)
        return jnp.asarray(value, like.dtype)

    graphdef, params, batch_stats = abstract(config)
    params = jax.tree_util.tree_map_with_path(leaf, params)
    batch_stats = jax.tree_util.tree_map_with_path(leaf, batch_stats)
    return Pair(config, graphdef, params, batch_stats, make_twin(config, params, batch_stats))


def dyadic_data(config: ResNetConfig) -> tuple[np.ndarray, np.ndarray]:
    """Two images, and what the loss multiplies their logits by.

    Behind a large stem the images are larger: the last stage must have room for a 3x3 kernel.
    """
    rng = np.random.default_rng(1)
    size = 128 if config.stem in (Stem.CONV7_BN_RELU_POOL, Stem.CONV7_POOL) else 32
    image = rng.integers(-2, 3, (2, size, size, config.image_channels))
    weight = rng.choice([-1, 1], (2, 10))
    return image.astype(config.dtype.value), weight.astype(config.dtype.value)


def ours(pair: Pair, *, compiled: bool = False) -> Arrays:
    """Logits, the image's gradient and every parameter's, in PyTorch's names and layout."""
    image, weight = dyadic_data(pair.config)

    def loss_fn(params: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(pair.graphdef, params, pair.batch_stats, copy=True)
        model.eval()
        logits = model(image)
        return (logits * weight).sum(), logits

    grad_fn = jax.grad(loss_fn, (0, 1), has_aux=True)
    if compiled:
        grad_fn = jax.jit(grad_fn, compiler_options=compiler_options())
    (params, image_grad), logits = grad_fn(pair.params, jnp.asarray(image))
    image_grad = np.asarray(image_grad).transpose(0, 3, 1, 2)
    return {"logits": np.asarray(logits), "image": image_grad} | tree_to_torch(params)


def theirs(pair: Pair) -> Arrays:
    """The same from PyTorch."""
    image, weight = dyadic_data(pair.config)
    x = to_torch(image).requires_grad_()
    logits = pair.twin.eval()(x)
    (logits * torch.tensor(weight)).sum().backward()
    params = {name: p.grad.numpy() for name, p in pair.twin.named_parameters()}
    return {"logits": logits.detach().numpy(), "image": x.grad.numpy()} | params


def differing(a: Arrays, b: Arrays) -> list[str]:
    """Names of the arrays that are not equal in every element."""
    assert a.keys() == b.keys()
    return [name for name in a if not np.array_equal(a[name], b[name])]


def assert_tells_much(arrays: Arrays) -> None:
    """Equality of zeros, or of a few numbers, would prove nothing."""
    assert len(np.unique(arrays["logits"])) >= 15
    assert all(array.any() for array in arrays.values())
    gradients = np.concatenate([array.ravel() for array in arrays.values()])
    assert np.mean(gradients != 0) > 0.3
    assert len(np.unique(gradients)) > 500


@pytest.mark.parametrize(
    ("depth", "network"),
    [
        pytest.param(
            depth,
            network,
            marks=() if (depth, network) in QUICK_FLOAT64 else pytest.mark.slow,
        )
        for depth, networks in {20: NETWORKS, 56: PAPERS, 110: PAPERS}.items()
        for network in networks
    ],
)
def test_float64_is_identical(depth: int, network: str) -> None:
    pair = dyadic_pair(replace(NETWORKS[network], depth=depth, dtype=DType.FLOAT64))
    expected = theirs(pair)
    assert_tells_much(expected)
    assert differing(ours(pair, compiled=depth == 20), expected) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_float64_of_a_large_network_is_identical(name: str) -> None:
    """The max-pool's gradient too, where several of its nine pixels are the largest."""
    pair = dyadic_pair(LARGE[name], taps={"34-plain": 14, "34-C": 4}.get(name))
    expected = theirs(pair)
    assert_tells_much(expected)
    assert differing(ours(pair), expected) == []


@pytest.mark.parametrize(
    ("depth", "network", "taps"),
    [
        pytest.param(
            depth,
            network,
            1 if depth == 110 else None,
            marks=() if (depth, network) in QUICK_FLOAT32 else pytest.mark.slow,
        )
        for depth, networks in {20: NETWORKS, 56: ("plain", "A", "C"), 110: ("A", "B")}.items()
        for network in networks
    ],
)
def test_float32_is_identical(depth: int, network: str, taps: int | None) -> None:
    config = replace(NETWORKS[network], depth=depth)
    pair, exact = (
        dyadic_pair(replace(config, dtype=dtype), taps) for dtype in (DType.FLOAT32, DType.FLOAT64)
    )
    found, expected = ours(pair), theirs(pair)
    assert {array.dtype for array in (found | expected).values()} == {np.dtype("float32")}
    assert_tells_much(expected)
    assert differing(found, expected) == []
    assert differing(found, theirs(exact)) == []


def same_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorFlow's: at stride 2 it pads (0, 1)."""
    conv = resnet.conv

    def mutant(*args: Any, **kwargs: Any) -> nnx.Conv:
        layer = conv(*args, **kwargs)
        layer.padding = "SAME"
        return layer

    monkeypatch.setattr(resnet, "conv", mutant)


def late_stride(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block's second convolution strides instead of its first."""
    init = resnet.BasicBlock.__init__

    def mutant(self: resnet.BasicBlock, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.conv1.strides, self.conv2.strides = self.conv2.strides, self.conv1.strides

    monkeypatch.setattr(resnet.BasicBlock, "__init__", mutant)


def odd_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Option A keeps every other pixel from the second on."""
    call = resnet.ZeroPad.__call__
    monkeypatch.setattr(resnet.ZeroPad, "__call__", lambda self, x: call(self, x[:, 1:, 1:]))


def centred_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    centre = resnet.ChannelPad.CENTRE
    zero_pad = resnet.ZeroPad
    monkeypatch.setattr(resnet, "ZeroPad", lambda _, *sizes: zero_pad(centre, *sizes))


def blue_first(monkeypatch: pytest.MonkeyPatch) -> None:
    call = resnet.ResNet.__call__
    monkeypatch.setattr(resnet.ResNet, "__call__", lambda self, x: call(self, x[..., ::-1]))


def other_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong in its tenth digit."""
    epsilon = EPSILON * (1 + 1e-9)
    monkeypatch.setattr(
        resnet,
        "BatchNorm",
        lambda *args, **kwargs: BatchNorm(*args, **kwargs | {"epsilon": epsilon}),
    )


def relu_before_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(self: resnet.BasicBlock, x: jax.Array) -> jax.Array:
        y = self.bn1(nnx.relu(self.conv1(x)))
        return self.bn2(self.conv2(y), add=self.shortcut(x), relu=True)

    monkeypatch.setattr(resnet.BasicBlock, "__call__", mutant)


def relu_before_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    call = BatchNorm.__call__

    def mutant(self: BatchNorm, x: jax.Array, *, add: Any = 0, relu: bool = False) -> jax.Array:
        return call(self, x, relu=relu) + add

    monkeypatch.setattr(BatchNorm, "__call__", mutant)


def half_a_gradient_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """`maximum` shares the gradient between equals; PyTorch's relu has none at 0."""
    call = BatchNorm.__call__

    def mutant(self: BatchNorm, x: jax.Array, *, add: Any = None, relu: bool = False) -> jax.Array:
        y = call(self, x, add=add)
        return jnp.maximum(y, 0) if relu else y

    monkeypatch.setattr(BatchNorm, "__call__", mutant)


MUTANTS = [
    late_stride,
    same_pad,
    odd_pixels,
    centred_channels,
    blue_first,
    other_epsilon,
    relu_before_batch_norm,
    relu_before_addition,
    half_a_gradient_at_zero,
]


@pytest.mark.parametrize("mutate", one_by_default(MUTANTS))
def test_a_mutant_differs(mutate: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    pair = dyadic_pair(ResNetConfig.paper(dtype=DType.FLOAT64))
    names = differing(ours(pair), theirs(pair))
    assert "stages.0.0.conv1.weight" in names
    assert ("logits" in names) == (mutate is not half_a_gradient_at_zero)
