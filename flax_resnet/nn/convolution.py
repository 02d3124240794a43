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
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flax_resnet import platforms

Image = Float[Array, "b h w c_in"]
Result = Float[Array, "b h2 w2 c_out"]
Kernel = Float[Array, "kh kw c_in c_out"]
Window = tuple[int, int]
Padding = tuple[Window, Window]  # low and high, of height and width

NHWC = ("NHWC", "HWIO", "NHWC")


class Conv(nnx.Conv):
    """`nnx.Conv`, which while it trains has the gradients below.

    In evaluation mode it has JAX's own, which know forward mode, too: `jax.jvp`, `jax.jacfwd`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.use_running_average = False

    @property
    def use_running_average(self) -> bool:
        """Whether this is evaluation mode: the name that `nnx.Module.train` and `eval` look for."""
        return self.conv_general_dilated is lax.conv_general_dilated

    @use_running_average.setter
    def use_running_average(self, value: bool) -> None:
        self.conv_general_dilated = lax.conv_general_dilated if value else conv_general_dilated


def conv_general_dilated(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[Window],
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    **options: Any,
) -> Array:
    """`jax.lax.conv_general_dilated` with all of its options, as `nnx.Conv` calls it.

    On the CPU an ordinary convolution of images (see `is_ordinary`) has the gradients below, which
    are reverse-mode only. Any other convolution has JAX's own.
    """
    if not platforms.on_cpu() or not is_ordinary(x, kernel, **options):
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **options,
        )
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    pads = tuple((low, high) for low, high in padding)
    return convolve(x, kernel, tuple(strides), pads, precision, preferred_element_type)


def is_ordinary(
    x: Array,
    kernel: Array,
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    out_sharding: Any = None,
    **unknown: Any,
) -> bool:
    """Whether it is of images (b, h, w, c), undilated and ungrouped, and asks for nothing else."""
    if unknown or out_sharding is not None or x.ndim != 4:
        return False
    given, usual = (
        lax.conv_dimension_numbers(x.shape, kernel.shape, numbers)
        for numbers in (dimension_numbers, NHWC)
    )
    is_dilated = any(size != 1 for size in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    return given == usual and not is_dilated and feature_group_count == batch_group_count == 1


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def convolve(
    x: Image,
    kernel: Kernel,
    strides: Window,
    padding: Padding,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Result:
    """Cross-correlation, as in PyTorch."""
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=NHWC,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def _forward(
    x: Image,
    kernel: Kernel,
    strides: Window,
    padding: Padding,
    precision: lax.PrecisionLike,
    preferred_element_type: DTypeLike | None,
) -> tuple[Result, tuple[Image, Kernel]]:
    return convolve(x, kernel, strides, padding, precision, preferred_element_type), (x, kernel)


def _backward(
    strides: Window,
    padding: Padding,
    precision: lax.PrecisionLike,
    _: DTypeLike | None,  # dy has it
    residuals: tuple[Image, Kernel],
    dy: Result,
) -> tuple[Image, Kernel]:
    x, kernel = residuals
    if dy.size == 0:  # an empty batch, or a kernel larger than the padded image
        return jnp.zeros_like(x), jnp.zeros_like(kernel)
    windows = list(
        zip(x.shape[1:3], dy.shape[1:3], kernel.shape[:2], strides, padding, strict=True)
    )
    spread = [(out - 1) * stride + 1 for _, out, _, stride, _ in windows]  # of dy, dilated
    convolution = partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        dimension_numbers=NHWC,
        precision=precision,
    )

    # dx: dy, dilated by the stride, with the kernel turned by 180 degrees.
    low = [k - 1 - pad[0] for _, _, k, _, pad in windows]
    high = [
        size - s + k - 1 - lo
        for (size, _, k, _, _), s, lo in zip(windows, spread, low, strict=True)
    ]
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    dx = convolution(
        dy,
        turned.astype(dy.dtype),
        padding=list(zip(low, high, strict=True)),
        lhs_dilation=strides,
    )

    # dkernel: x with dy as the kernel, summed over the batch, which takes the channels' place.
    pads = [
        (pad[0], s + k - 1 - size - pad[0])
        for (size, _, k, _, pad), s in zip(windows, spread, strict=True)
    ]
    dkernel = convolution(
        x.transpose(3, 1, 2, 0).astype(dy.dtype),
        dy.transpose(1, 2, 0, 3),
        padding=pads,
        rhs_dilation=strides,
    )
    return dx.astype(x.dtype), dkernel.transpose(1, 2, 0, 3).astype(kernel.dtype)


convolve.defvjp(_forward, _backward)
