"""Rectified linear units whose gradient reads their result, which is stored anyway.

Gradients are reverse-mode only. At 0 they are 0, as PyTorch's and `jax.nn.relu`'s are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_resnet.cpu import materialized

Tensor = Float[Array, "*shape"]


@jax.custom_vjp
def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return _relu(x)


@jax.custom_vjp
def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """max(x + y, 0), the end of a residual block (paper, figure 2)."""
    return _add_relu(x, y)


@materialized
def _relu(x: Tensor) -> Tensor:
    return jnp.maximum(x, 0)


@materialized
def _add_relu(x: Tensor, y: Tensor) -> Tensor:
    return jnp.maximum(x + y, 0)


def _gradient(result: Tensor, cotangent: Tensor) -> Tensor:
    return jnp.where(result > 0, cotangent, 0)


relu.defvjp(
    lambda x: (_relu(x),) * 2,
    lambda result, cotangent: (_gradient(result, cotangent),),
)
add_relu.defvjp(
    lambda x, y: (_add_relu(x, y),) * 2,
    lambda result, cotangent: (_gradient(result, cotangent),) * 2,
)
