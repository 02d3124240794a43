"""Batch normalisation (Ioffe & Szegedy 2015) with PyTorch's statistics.

`nnx.BatchNorm` cannot be bent to them: it keeps a biased running variance, in float32 whatever
`param_dtype` says, from a one-pass variance that can go negative (google/flax#1491).
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flax_resnet.errors import UserError
from flax_resnet.nn.cpu import materialized


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
        shares: the batch lies in so many equal parts on as many devices of the mesh around it.
        is_global: whether the statistics are those of the whole batch. Else each share has its own,
            and the running ones follow their average.
        axis_name: of a `pmap` whose devices have a share each and statistics in common.
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
        self.shares = 1
        self.is_global = True
        self.axis_name: str | None = None
        self.scale = nnx.Param(jnp.ones(num_features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(num_features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(num_features, param_dtype))
        self.var = nnx.BatchStat(jnp.ones(num_features, param_dtype))

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        *,
        add: Float[Array, "b h w c"] | None = None,
        relu: bool = False,
    ) -> Float[Array, "b h w c"]:
        """y, plus `add`, rectified: as much of it as is asked for, in one pass over memory.

        Args:
            add: a block's shortcut (paper, figure 2).
            relu: rectify; the gradient at 0 is 0, as PyTorch's and `jax.nn.relu`'s are.

        Raises:
            UserError: in training mode, fewer than two values make up a statistic: their unbiased
                variance does not exist.
        """
        ending = Ending(jnp.dtype(self.dtype), add is not None, relu)
        if self.use_running_average:
            x = x.astype(self.scale.dtype)
            factor = lax.rsqrt(self.var[...] + self.epsilon) * self.scale[...]
            return finish(ending)(x, self.mean[...], factor, self.bias[...], add)
        n = self._values_per_statistic(x.shape)
        sharing = Sharing(self.shares, self.is_global, self.axis_name)
        normalized: Any = batch_normalize(
            x, self.scale[...], self.bias[...], add, self.epsilon, sharing, ending
        )
        self._track(self.mean, normalized.mean)
        self._track(self.var, normalized.var * (n / (n - 1)))
        return normalized.y

    def _values_per_statistic(self, shape: tuple[int, ...]) -> int:
        devices = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        replicas = 1 if self.is_global else self.shares
        n = math.prod(shape[:-1]) * devices // replicas
        if n < 2:
            raise UserError(
                "BatchNorm must have at least 2 values per channel and replica when it trains, got "
                f"{n}: input {shape}, {replicas} replica(s); take more or larger images"
            )
        return n

    def _track(self, running: nnx.BatchStat, new: Float[Array, "r 1 1 1 c"]) -> None:
        new = new.mean((0, 1, 2, 3))
        running[...] = (1 - self.momentum) * running[...] + self.momentum * new


Images = Float[Array, "b h w c"]
Parts = Float[Array, "r _ h w c"]  # each share of the batch by itself
Statistic = Float[Array, "r 1 1 1 c"]  # of each share, or of all: r is 1
PerChannel = Float[Array, " c"]


class Sharing(NamedTuple):
    """Who shares a batch and its statistics: see `BatchNorm`."""

    shares: int
    is_global: bool
    axis_name: str | None

    @property
    def is_needed(self) -> bool:
        """Whether a device needs what the others have."""
        return self.is_global and (self.shares > 1 or self.axis_name is not None)

    def parts(self, x: Images) -> Parts:
        """Each share of a batch."""
        return x.reshape(self.shares, -1, *x.shape[1:])

    def gather(self, *statistics: Statistic) -> Float[Array, "k s 1 1 1 c"]:
        """Statistics of every share, everywhere: one small collective for all of them."""
        together = jnp.stack(statistics)
        if self.axis_name is None:
            return lax.with_sharding_constraint(together, PartitionSpec())
        return lax.all_gather(together, self.axis_name, axis=1, tiled=True)


class Ending(NamedTuple):
    """What follows the normalisation, in the same pass over memory."""

    dtype: jnp.dtype  # that y is rounded to
    has_add: bool
    relu: bool


class Normalized(NamedTuple):
    """Result of `batch_normalize`."""

    y: Images
    mean: Statistic
    var: Statistic


class Residuals(NamedTuple):
    """What `batch_normalize` stores for its gradient.

    x and y are the arrays that the layers around it store, of the same type and shape: a `Scan`
    would store others once more.
    """

    x: Images
    mean: Statistic
    inv_std: Statistic
    scale: PerChannel
    y: Images | None  # if it is rectified


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def batch_normalize(
    x: Images,
    scale: PerChannel,
    bias: PerChannel,
    add: Images | None,
    epsilon: float,
    sharing: Sharing,
    ending: Ending,
) -> Normalized:
    """Each share of the batch normalised by its own statistics, and these, with a biased variance.

    The gradient of y is the closed form of Ioffe & Szegedy 2015, section 3, with half the passes
    over x that autodiff's needs; that of the rectifier reads its result, which the next layer
    stores anyway. The statistics have none. Reverse-mode only.
    """
    return _forward(x, scale, bias, add, epsilon, sharing, ending)[0]


def _forward(
    x: Images,
    scale: PerChannel,
    bias: PerChannel,
    add: Images | None,
    epsilon: float,
    sharing: Sharing,
    ending: Ending,
) -> tuple[Normalized, Residuals]:
    parts = sharing.parts(x).astype(scale.dtype)
    # Two passes: E[x^2] - E[x]^2 cancels when the mean is far from zero.
    mean = _mean(parts)
    var = _mean(jnp.square(parts - mean))
    if sharing.is_needed:  # Chan, Golub and LeVeque 1979, for shares of one size
        means, variances = sharing.gather(mean, var)
        mean = means.mean(0, keepdims=True)
        var = (variances + jnp.square(means - mean)).mean(0, keepdims=True)
    inv_std = lax.rsqrt(var + epsilon)
    added = None if add is None else sharing.parts(add)
    y = finish(ending)(parts, mean, inv_std * scale, bias, added).reshape(x.shape)
    return Normalized(y, mean, var), Residuals(x, mean, inv_std, scale, y if ending.relu else None)


def _backward(
    epsilon: float,
    sharing: Sharing,
    ending: Ending,
    residuals: Residuals,
    cotangent: Normalized,
) -> tuple[Images, PerChannel, PerChannel, Images | None]:
    stored, mean, inv_std, scale, y = residuals
    x = sharing.parts(stored).astype(scale.dtype)
    dadd = cotangent.y if y is None else jnp.where(y > 0, cotangent.y, 0)
    dy = sharing.parts(dadd).astype(x.dtype)
    dbias = _mean(dy)
    dscale = _mean(dy * (x - mean)) * inv_std
    offset, slope = dbias, dscale
    if sharing.is_needed:
        dbiases, dscales = sharing.gather(dbias, dscale)
        offset, slope = dbiases.mean(0, keepdims=True), dscales.mean(0, keepdims=True)
        if sharing.axis_name is None:  # a `pmap` adds the gradients up itself
            dbias, dscale = dbiases, dscales
    dx = (dy - offset - (x - mean) * (slope * inv_std)) * (inv_std * scale)
    n = float(x.size // x.shape[-1] // x.shape[0])  # an integer may be beyond int32
    dscale, dbias = (d.sum((0, 1, 2, 3)) * n for d in (dscale, dbias))
    dx = dx.astype(stored.dtype).reshape(stored.shape)
    return dx, dscale, dbias, dadd if ending.has_add else None


batch_normalize.defvjp(_forward, _backward)


@cache
def finish(ending: Ending) -> Callable[..., Array]:
    """(x - mean) * factor + bias and what follows it, as one pass over memory."""

    @materialized
    def run(x: Array, mean: Array, factor: Array, bias: Array, add: Array | None) -> Array:
        y = ((x - mean) * factor + bias).astype(ending.dtype)
        if add is not None:
            y = y + add
        return lax.select(y <= 0, jnp.zeros_like(y), y) if ending.relu else y  # NaN stays

    return run


def _mean(x: Parts) -> Statistic:
    return x.mean((1, 2, 3), keepdims=True)
