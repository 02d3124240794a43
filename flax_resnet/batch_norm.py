"""Batch normalisation (Ioffe & Szegedy 2015) with PyTorch's statistics.

`nnx.BatchNorm` cannot be bent to them: it keeps a biased running variance, in float32 whatever
`param_dtype` says, from a one-pass variance that can go negative (google/flax#1491).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Normalized(NamedTuple):
    """Result of `normalize`."""

    y: Float[Array, "r b h w c"]
    mean: Float[Array, "r 1 1 1 c"]
    var: Float[Array, "r 1 1 1 c"]


class BatchNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias, per channel.

    In training mode mean and (biased) variance are the batch's, and the running ones move towards
    the batch's mean and *unbiased* variance; in evaluation mode the running ones are used.

    Args:
        num_features: channels of x.
        momentum: weight of the new batch in the running statistics: PyTorch's convention, one
            minus Flax's.
        dtype: of the result; the arithmetic is done in `param_dtype`.
        param_dtype: of scale, bias and the running statistics.

    Attributes:
        replicas: the batch is normalised in so many equal parts, each by its own statistics; the
            running ones follow their average.
        axis_name: of a `pmap` whose devices share their statistics.
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.1,
        epsilon: float = 1e-5,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.use_running_average = False  # set by `nnx.Module.train` and `eval`
        self.replicas = 1
        self.axis_name: str | None = None
        self.scale = nnx.Param(jnp.ones(num_features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(num_features, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(num_features, param_dtype))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        shape = x.shape
        x = x.astype(self.scale.dtype)
        if self.use_running_average:
            scale = lax.rsqrt(self.var[...] + self.epsilon) * self.scale[...]
            y = (x - self.mean[...]) * scale + self.bias[...]
        else:
            x = x.reshape(self.replicas, -1, *shape[1:])
            normalized: Any = normalize(
                x, self.scale[...], self.bias[...], self.epsilon, self.axis_name
            )
            y = normalized.y
            n = x.size // x.shape[-1] // self.replicas
            n *= 1 if self.axis_name is None else lax.axis_size(self.axis_name)
            self._track(self.mean, normalized.mean)
            self._track(self.var, normalized.var * (n / (n - 1)))
        return y.reshape(shape).astype(self.dtype)

    def _track(self, running: nnx.BatchStat, new: Float[Array, "r 1 1 1 c"]) -> None:
        new = new.mean((0, 1, 2, 3))
        running[...] = (1 - self.momentum) * running[...] + self.momentum * new


Parts = Float[Array, "r b h w c"]
Statistic = Float[Array, "r 1 1 1 c"]
PerChannel = Float[Array, " c"]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(
    x: Parts, scale: PerChannel, bias: PerChannel, epsilon: float, axis_name: str | None
) -> Normalized:
    """Each part of the batch normalised by its own statistics, and these, with a biased variance.

    The gradient of y is the closed form of Ioffe & Szegedy 2015, section 3, with half the passes
    over x that autodiff's needs; the statistics have none.
    """
    return _forward(x, scale, bias, epsilon, axis_name)[0]


def _forward(
    x: Parts, scale: PerChannel, bias: PerChannel, epsilon: float, axis_name: str | None
) -> tuple[Normalized, tuple[Parts, Statistic, Statistic, PerChannel]]:
    # Two passes: E[x^2] - E[x]^2 cancels when the mean is far from zero.
    mean = _across(_mean(x), axis_name)
    var = _across(_mean(jnp.square(x - mean)), axis_name)
    inv_std = lax.rsqrt(var + epsilon)
    y = (x - mean) * (inv_std * scale) + bias
    return Normalized(y, mean, var), (x, mean, inv_std, scale)


def _backward(
    epsilon: float,
    axis_name: str | None,
    residuals: tuple[Parts, Statistic, Statistic, PerChannel],
    cotangent: Normalized,
) -> tuple[Parts, PerChannel, PerChannel]:
    x, mean, inv_std, scale = residuals
    dy = cotangent.y
    dbias = _mean(dy)
    dscale = _mean(dy * (x - mean)) * inv_std
    slope = _across(dscale, axis_name) * inv_std
    dx = (dy - _across(dbias, axis_name) - (x - mean) * slope) * (inv_std * scale)
    n = x.size // x.shape[-1] // x.shape[0]
    return dx, dscale.sum((0, 1, 2, 3)) * n, dbias.sum((0, 1, 2, 3)) * n


normalize.defvjp(_forward, _backward)


def _mean(x: Parts) -> Statistic:
    return x.mean((1, 2, 3), keepdims=True)


def _across(mean: Statistic, axis_name: str | None) -> Statistic:
    """The mean over all devices of a `pmap`."""
    return mean if axis_name is None else lax.pmean(mean, axis_name)
