"""Max-pooling whose gradient XLA's CPU backend can compute fast."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from flax_resnet import platforms

Image = Float[Array, "b h w c"]
Pooled = Float[Array, "b h2 w2 c"]


class MaxPool(nnx.Module):
    """The largest of 3x3 pixels, at every second, with one row of padding on each side.

    As PyTorch pads; "SAME" would pad (0, 1) where the image's size is even. Of several that are
    the largest, the first row by row has the gradient, as in PyTorch.
    """

    def __call__(self, x: Image) -> Pooled:
        if platforms.on_cpu():
            return largest_of_slices(x)
        padding = ((0, 0), (1, 1), (1, 1), (0, 0))
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def largest_of_slices(x: Image) -> Pooled:
    """The same numbers, and the same gradients, by nine slices compared one after another.

    The gradient of `reduce_window` is one slow loop on a CPU, that of comparisons and slices is
    not.
    """
    rows, columns = ((size - 1) // 2 for size in x.shape[1:3])  # of the last pixel
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    first, *others = (
        x[:, i : i + 2 * rows + 1 : 2, j : j + 2 * columns + 1 : 2]
        for i in range(3)
        for j in range(3)
    )
    largest = first
    for pixel in others:
        largest = jnp.where((pixel > largest) | jnp.isnan(pixel), pixel, largest)
    return largest
