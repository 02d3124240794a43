"""Claim: the max-pool and its gradient are PyTorch's, written for a CPU and for other devices.

In float64 on small integers, so that most windows have several largest pixels, and the gradients
add up exactly: no tolerance.
"""

import jax
import numpy as np
import pytest

from flax_resnet import platforms
from flax_resnet.nn.pooling import MaxPool
from parity_tests.pair import to_torch, torch


def theirs(x: np.ndarray, cotangent: np.ndarray) -> list[np.ndarray]:
    image = to_torch(x).requires_grad_()
    largest = torch.nn.functional.max_pool2d(image, 3, stride=2, padding=1)
    (gradient,) = torch.autograd.grad(largest, image, to_torch(cotangent))
    return [largest.detach().numpy(), gradient.numpy()]


def ours(x: np.ndarray, cotangent: np.ndarray) -> list[np.ndarray]:
    def run(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        largest, gradient = jax.vjp(MaxPool(), x)
        return largest, *gradient(cotangent)

    return [to_torch(np.array(array)).numpy() for array in jax.jit(run)(x, cotangent)]


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize("size", [(8, 7), (9, 6), (1, 1), (2, 1)])
def test_it_is_pytorchs(
    size: tuple[int, int], is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms, "on_cpu", lambda: is_cpu)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (2, *size, 3)).astype(np.float64)
    cotangent = rng.integers(1, 9, (2, *((n + 1) // 2 for n in size), 3)).astype(np.float64)
    for found, expected in zip(ours(x, cotangent), theirs(x, cotangent), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("is_cpu", [True, False])
def test_what_is_no_number_stays(is_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "on_cpu", lambda: is_cpu)
    x = np.zeros((1, 8, 8, 1))
    x[0, 3, 4] = np.nan
    found, _ = ours(x, np.ones((1, 4, 4, 1)))
    expected, _ = theirs(x, np.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(found, expected)
    assert np.isnan(found).any()
