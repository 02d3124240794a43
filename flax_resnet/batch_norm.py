"""Batch normalisation (Ioffe & Szegedy 2015) with PyTorch's statistics.

`nnx.BatchNorm` cannot be bent to them: it keeps a biased running variance, in float32 whatever
`param_dtype` says, from a one-pass variance that can go negative (google/flax#1491).
"""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


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
            mean, var = self.mean[...], self.var[...]
        else:
            x = x.reshape(self.replicas, -1, *shape[1:])
            # Two passes: E[x^2] - E[x]^2 cancels when the mean is far from zero.
            mean = self._mean(x)
            var = self._mean(jnp.square(x - mean))
            n = x.size // x.shape[-1] // self.replicas * self._axis_size()
            self._track(self.mean, mean)
            self._track(self.var, var * (n / (n - 1)))
        y = (x - mean) * (lax.rsqrt(var + self.epsilon) * self.scale[...]) + self.bias[...]
        return y.reshape(shape).astype(self.dtype)

    def _mean(self, x: Float[Array, "r b h w c"]) -> Float[Array, "r 1 1 1 c"]:
        mean = x.mean((1, 2, 3), keepdims=True)
        return mean if self.axis_name is None else lax.pmean(mean, self.axis_name)

    def _axis_size(self) -> int:
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def _track(self, running: nnx.BatchStat, new: Float[Array, "r 1 1 1 c"]) -> None:
        new = lax.stop_gradient(new).mean((0, 1, 2, 3))
        running[...] = (1 - self.momentum) * running[...] + self.momentum * new
