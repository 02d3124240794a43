"""Convolution of images whose gradients XLA's CPU backend can compute fast wherever they stand.

In the body of a loop (a scan over blocks or over steps) XLA leaves the gradients of a convolution
in layouts that its CPU backend has no fast path for (jax-ml/jax#12868 is related). Written out as
convolutions in the usual layout they cost the same inside a loop as outside. On other backends
JAX's own gradients stay, which cuDNN's kernels are matched to.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

Image = Float[Array, "b h w c_in"]
Result = Float[Array, "b h2 w2 c_out"]
Kernel = Float[Array, "kh kw c_in c_out"]
Window = tuple[int, int]
Padding = tuple[Window, Window]  # low and high, of height and width

NHWC = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
    x: Image,
    kernel: Kernel,
    strides: Sequence[int],
    padding: str | Sequence[Window],
    **options: Any,
) -> Result:
    """`jax.lax.conv_general_dilated` as `nnx.Conv` calls it, undilated and ungrouped.

    On the CPU its gradients are reverse-mode only.
    """
    if jax.default_backend() == "cpu":
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
        return convolve(x, kernel, tuple(strides), tuple((low, high) for low, high in padding))
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: Image, kernel: Kernel, strides: Window, padding: Padding) -> Result:
    """Cross-correlation, as in PyTorch."""
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def _forward(
    x: Image, kernel: Kernel, strides: Window, padding: Padding
) -> tuple[Result, tuple[Image, Kernel]]:
    return convolve(x, kernel, strides, padding), (x, kernel)


def _backward(
    strides: Window, padding: Padding, residuals: tuple[Image, Kernel], dy: Result
) -> tuple[Image, Kernel]:
    x, kernel = residuals
    windows = list(
        zip(x.shape[1:3], dy.shape[1:3], kernel.shape[:2], strides, padding, strict=True)
    )
    spread = [(out - 1) * stride + 1 for _, out, _, stride, _ in windows]  # of dy, dilated

    # dx: dy, dilated by the stride, with the kernel turned by 180 degrees.
    low = [k - 1 - pad[0] for _, _, k, _, pad in windows]
    high = [
        size - s + k - 1 - lo
        for (size, _, k, _, _), s, lo in zip(windows, spread, low, strict=True)
    ]
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    dx = lax.conv_general_dilated(
        dy,
        turned,
        (1, 1),
        list(zip(low, high, strict=True)),
        lhs_dilation=strides,
        dimension_numbers=NHWC,
    )

    # dkernel: x with dy as the kernel, summed over the batch, which takes the channels' place.
    pads = [
        (pad[0], s + k - 1 - size - pad[0])
        for (size, _, k, _, pad), s in zip(windows, spread, strict=True)
    ]
    dkernel = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        pads,
        rhs_dilation=strides,
        dimension_numbers=NHWC,
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)
