"""Claim: a training step in bfloat16 is as near to the truth as PyTorch's under autocast is.

The truth is the twin in float64, from the same weights and images. The distance of one step's loss,
gradients and running statistics from it is ||x - truth|| / ||truth||, over all parameters at once;
here its root mean square over eight sets of weights and batches of digits. Measured, ours and
PyTorch's: loss 3.1e-4 and 4.2e-4, gradients 0.143 and 0.142, statistics 5.04e-4 and 5.18e-4. All
come from rounding the same convolutions' inputs and results to 8 bits, so that ours may be no more
than 1.1 times as far, with the statistics 1.04 times, and the loss, one number of random sign, 1.5
times. A mutant is at least 1.08 times as far in the statistics, or 1.9 times in the gradients. In
float32 gradients and statistics are under a tenth as far, so that half of PyTorch's distance shows
that it is bfloat16.

One step, because small differences grow with every further one and soon hide their cause: after
five steps the parameters are off by 0.40 of the distance that they have moved, PyTorch's by 0.38,
and by 0.43 with the mutant that after one step is twice as far off.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from flax_resnet import resnet
from flax_resnet.config import DType, ResNetConfig, Shortcut
from flax_resnet.data import digits
from flax_resnet.nn.batch_norm import BatchNorm
from flax_resnet.nn.convolution import convolve
from flax_resnet.nn.cpu import compiler_options
from flax_resnet.resnet import abstract
from flax_resnet.step import measure
from flax_resnet.weights.state_dict import tree_to_torch
from parity_tests.pair import Pair, make_pair, to_torch, torch
from torch_ref import step as torch_step

Arrays = dict[str, np.ndarray]
CONFIG = ResNetConfig.paper(8, Shortcut.B, dtype=DType.BFLOAT16)
SEEDS = 8
BATCH_SIZE = 16


class Results(NamedTuple):
    """What a step computes (arrays by PyTorch's names), or how far each is from the truth."""

    loss: Any
    gradients: Any
    statistics: Any


def digits_batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    train = digits.load()["train"]
    chosen = np.random.default_rng(seed).choice(len(train.label), BATCH_SIZE, replace=False)
    return train.image[chosen] / np.float32(255), train.label[chosen].astype(np.int64)


@cache
def pairs() -> list[Pair]:
    return [make_pair(CONFIG, seed) for seed in range(SEEDS)]


def ours() -> list[Results]:
    """For each seed; the weights and the images are float32."""
    graphdef, *_ = abstract(CONFIG)  # built anew: a mutant may change it

    def loss_fn(params: Any, batch_stats: Any, image: jax.Array, label: jax.Array) -> Any:
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        metrics = measure(model(image), label)
        loss = metrics.loss / metrics.examples
        return loss, (loss, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    grad_fn = jax.jit(jax.grad(loss_fn, has_aux=True), compiler_options=compiler_options())
    results = []
    for seed, pair in enumerate(pairs()):
        grads, (loss, stats) = grad_fn(pair.params, pair.batch_stats, *digits_batch(seed))
        loss = {"loss": np.asarray(loss)}
        results.append(Results(loss, tree_to_torch(grads), tree_to_torch(stats)))
    return results


def theirs(dtype: DType) -> list[Results]:
    """The twin's: in float32 under autocast to bfloat16, or in float64."""
    results = []
    for seed, pair in enumerate(pairs()):
        image, label = digits_batch(seed)
        twin = deepcopy(pair.twin).train()
        if dtype is DType.FLOAT64:
            twin, image = twin.double(), image.astype(np.float64)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is DType.BFLOAT16):
            metrics = torch_step.measure(twin(to_torch(image)), torch.tensor(label))
            loss = metrics.loss / metrics.examples
        loss.backward()
        grads = {name: p.grad.numpy() for name, p in twin.named_parameters()}
        stats = {name: b.numpy() for name, b in twin.named_buffers() if "running" in name}
        results.append(Results({"loss": loss.detach().numpy()}, grads, stats))
    return results


@cache
def truth() -> list[Results]:
    return theirs(DType.FLOAT64)


def vector(arrays: Arrays, like: Arrays) -> np.ndarray:
    return np.concatenate([arrays[name].ravel().astype(np.float64) for name in like])


def root_mean_square(ratios: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(ratios))))


def distances(results: list[Results]) -> Results:
    """Of the loss, the gradients and the statistics from the truth."""

    def distance(field: int) -> float:
        ratios = []
        for found, exact in zip(results, truth(), strict=True):
            a, b = (vector(arrays[field], exact[field]) for arrays in (found, exact))
            ratios.append(np.linalg.norm(a - b) / np.linalg.norm(b))
        return root_mean_square(ratios)

    return Results(*map(distance, range(3)))


@cache
def autocasts() -> Results:
    return distances(theirs(DType.BFLOAT16))


def test_a_step_is_as_near_to_the_truth_as_pytorchs() -> None:
    found, expected = distances(ours()), autocasts()
    assert found.loss <= 1.5 * expected.loss
    assert 0.5 * expected.gradients <= found.gradients <= 1.1 * expected.gradients
    assert 0.5 * expected.statistics <= found.statistics <= 1.04 * expected.statistics


def bfloat16_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch normalisation computes in bfloat16; its statistics stay float32."""

    def mutant(self: BatchNorm, x: jax.Array, *, add: Any = None, relu: bool = False) -> jax.Array:
        scale, bias = (p[...].astype(x.dtype) for p in (self.scale, self.bias))
        mean = x.mean((0, 1, 2))
        var = jnp.square(x - mean).mean((0, 1, 2))
        n = x.size // x.shape[-1]
        for running, new in ((self.mean, mean), (self.var, var * (n / (n - 1)))):
            self._track(running, new.astype(running.dtype).reshape(1, 1, 1, 1, -1))
        y = (x - mean) * lax.rsqrt(var + jnp.asarray(self.epsilon, x.dtype)) * scale + bias
        y = y if add is None else y + add
        return nnx.relu(y) if relu else y

    monkeypatch.setattr(BatchNorm, "__call__", mutant)


def bfloat16_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch's mean and variance are rounded before they are tracked."""
    track = BatchNorm._track

    def mutant(self: BatchNorm, running: nnx.BatchStat, new: jax.Array) -> None:
        track(self, running, new.astype(jnp.bfloat16).astype(new.dtype))

    monkeypatch.setattr(BatchNorm, "_track", mutant)


def coarse_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back to a convolution is rounded to 1/64 of its largest value."""
    backward = convolve.bwd

    def mutant(*args: Any) -> Any:
        *options, dy = args
        unit = jnp.abs(dy).max() / 64
        return backward(*options, jnp.round(dy / unit) * unit)

    monkeypatch.setattr(convolve, "bwd", mutant)


def float32_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is ignored."""
    monkeypatch.setattr(resnet, "compute_dtype", resnet.param_dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutate",
    [bfloat16_batch_norm, bfloat16_statistics, coarse_gradients, float32_everywhere],
    ids=lambda mutate: mutate.__name__,
)
def test_a_mutant_fails(mutate: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test_a_step_is_as_near_to_the_truth_as_pytorchs()
