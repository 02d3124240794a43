"""Claim: at every size, stride and padding a convolution and its gradients are PyTorch's and JAX's.

On small integers in float64, which every order of summation adds up exactly: no tolerance. Every
option of `jax.lax.conv_general_dilated` is honoured, in the result and in both gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flax_resnet.nn import convolution
from flax_resnet.nn.convolution import NHWC, conv_general_dilated, convolve
from parity_tests.pair import to_torch, torch

Convolution = Callable[..., jax.Array]
Pair = tuple[int, int]


class Case(NamedTuple):
    """One convolution, of images (2, *size, 3) with a kernel (*kernel, 3, 4)."""

    size: Pair
    kernel: Pair
    strides: Pair
    padding: str | tuple[Pair, Pair]


SAME_ON_BOTH_SIDES = {pad: ((pad, pad), (pad, pad)) for pad in range(4)}
CASES = {
    "ImageNet's first": Case((32, 32), (7, 7), (2, 2), SAME_ON_BOTH_SIDES[3]),
    "ImageNet's first, odd": Case((33, 29), (7, 7), (2, 2), SAME_ON_BOTH_SIDES[3]),
    "3x3, stride 2": Case((8, 10), (3, 3), (2, 2), SAME_ON_BOTH_SIDES[1]),
    "3x3, stride 2, odd": Case((9, 7), (3, 3), (2, 2), SAME_ON_BOTH_SIDES[1]),
    "3x3, stride 2, odd by even": Case((9, 8), (3, 3), (2, 2), SAME_ON_BOTH_SIDES[1]),
    "1x1, stride 2": Case((8, 6), (1, 1), (2, 2), SAME_ON_BOTH_SIDES[0]),
    "1x1, stride 2, odd": Case((9, 11), (1, 1), (2, 2), SAME_ON_BOTH_SIDES[0]),
    "last pixels not reached": Case((10, 12), (3, 3), (3, 4), SAME_ON_BOTH_SIDES[0]),
    "SAME, which pads (0, 1)": Case((8, 9), (3, 3), (2, 2), "SAME"),
    "SAME, of a kernel with uneven sides": Case((8, 9), (3, 5), (2, 1), "SAME"),
    "uneven in every way": Case((9, 10), (3, 5), (2, 1), ((0, 2), (3, 1))),
    "kernel larger than the image": Case((3, 2), (7, 7), (2, 2), SAME_ON_BOTH_SIDES[3]),
    "padding larger than the kernel": Case((5, 6), (1, 2), (2, 1), SAME_ON_BOTH_SIDES[2]),
    "padding below 0, which crops": Case((9, 8), (3, 3), (1, 2), ((-1, 0), (1, -2))),
}


def integers(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(-3, 4, shape).astype(np.float64) for shape in shapes]


def compiled(run: Callable[..., tuple[jax.Array, ...]], *args: np.ndarray) -> list[np.ndarray]:
    """run(*args), compiled without optimisation, which takes a third of the time."""
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    return [np.asarray(array) for array in run(*args)]


def gradients(function: Convolution, case: Case) -> list[np.ndarray]:
    """The result, and the gradients with respect to x and kernel of a weighted sum of it."""

    def run(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(
            lambda *args: function(*args, case.strides, case.padding, dimension_numbers=NHWC),
            x,
            kernel,
        )
        return y, *vjp(jnp.asarray(*integers(y.shape)))

    arrays = integers((2, *case.size, 3), (*case.kernel, 3, 4))
    run = jax.jit(
        run, compiler_options={"xla_backend_optimization_level": 0}
    )  # a third of the time
    return [np.asarray(array) for array in run(*arrays)]


def pytorchs(case: Case) -> list[np.ndarray]:
    """The same from PyTorch, with the padding as a step of its own: it can be uneven."""
    x, kernel = integers((2, *case.size, 3), (*case.kernel, 3, 4))
    image = to_torch(x).requires_grad_()
    weight = torch.tensor(kernel.transpose(3, 2, 0, 1)).requires_grad_()
    pads = case.padding
    if isinstance(pads, str):
        pads = lax.padtype_to_pads(case.size, case.kernel, case.strides, pads)
    (top, bottom), (left, right) = pads
    padded = torch.nn.functional.pad(image, (left, right, top, bottom))
    y = torch.nn.functional.conv2d(padded, weight, stride=case.strides)
    batch, c_out, height, width = y.shape
    y.backward(to_torch(*integers((batch, height, width, c_out))))
    image_axes, kernel_axes = (0, 2, 3, 1), (2, 3, 1, 0)
    return [
        y.detach().numpy().transpose(image_axes),
        image.grad.numpy().transpose(image_axes),
        weight.grad.numpy().transpose(kernel_axes),
    ]


@pytest.mark.parametrize("name", CASES)
def test_result_and_gradients_are_pytorchs_and_jaxs(name: str) -> None:
    ours, theirs = gradients(conv_general_dilated, CASES[name]), pytorchs(CASES[name])
    jaxs = gradients(lax.conv_general_dilated, CASES[name])
    for a, b, c in zip(ours, theirs, jaxs, strict=True):
        assert len(np.unique(b)) > 10  # equality of zeros would prove nothing
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize(
    ("batch", "size"), [(0, (5, 5)), (2, (2, 5))], ids=["no image", "an image that is too small"]
)
def test_where_no_pixel_comes_out_the_gradients_are_0(batch: int, size: Pair) -> None:
    def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=NHWC)

    x, kernel = map(jnp.asarray, integers((batch, *size, 3), (3, 3, 3, 4)))
    y, vjp = jax.vjp(run, x, kernel)
    assert y.size == 0
    for gradient, like in zip(vjp(jnp.zeros_like(y)), (x, kernel), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros_like(like))


Backward = Callable[..., tuple[jax.Array, jax.Array]]


def kernel_not_turned(backward: Backward, *args: Any) -> tuple[jax.Array, jax.Array]:
    *options, (x, kernel), dy = args
    dx, _ = backward(*options, (x, kernel[::-1, ::-1]), dy)
    return dx, backward(*args)[1]


def padding_swapped(backward: Backward, *args: Any) -> tuple[jax.Array, jax.Array]:
    """Low for high: right where they are equal and every pixel is reached."""
    strides, padding, *rest = args
    return backward(strides, tuple((high, low) for low, high in padding), *rest)


def aligned_with_the_end(backward: Backward, *args: Any) -> tuple[jax.Array, jax.Array]:
    """The pixels that are not reached come first: right where there are none."""
    strides, padding, *_, (x, kernel), dy = args
    unreached = [
        x.shape[i + 1] + sum(padding[i]) - (dy.shape[i + 1] - 1) * strides[i] - kernel.shape[i]
        for i in (0, 1)
    ]
    dx, dkernel = backward(*args)
    return jnp.roll(dx, unreached, (1, 2)), dkernel


def height_for_width(backward: Backward, *args: Any) -> tuple[jax.Array, jax.Array]:
    """The kernel's gradient mirrored at its diagonal: right if it is symmetric alone."""
    dx, dkernel = backward(*args)
    return dx, dkernel.transpose(1, 0, 2, 3).reshape(dkernel.shape)


MUTANTS = {
    kernel_not_turned: "3x3, stride 2",
    padding_swapped: "SAME, which pads (0, 1)",
    aligned_with_the_end: "3x3, stride 2",
    height_for_width: "uneven in every way",
}


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_a_mutant_differs(mutate: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[MUTANTS[mutate]]
    backward = convolve.bwd
    monkeypatch.setattr(convolve, "bwd", lambda *args: mutate(backward, *args))
    (y, *ours), (z, *theirs) = gradients(conv_general_dilated, case), pytorchs(case)
    np.testing.assert_array_equal(y, z)
    assert any(not np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


OTHERS = {
    "groups": {"feature_group_count": 2},
    "one group per channel": {"feature_group_count": 4},
    "dilated kernel": {"kernel_dilation": (1, 2)},
    "dilated image": {"input_dilation": (2, 1), "padding": ((1, 1), (0, 1))},
    "1 dimension": {"kernel_size": (3,)},
    "3 dimensions": {"kernel_size": (2, 3, 1)},
}


def program(function: Convolution, settings: dict[str, Any]) -> str:
    """An `nnx.Conv` of 4 and 8 channels and its gradients, as JAX will compile them."""
    settings = {"kernel_size": (3, 3), "strides": 2, "padding": 1} | settings
    layer = nnx.eval_shape(
        lambda: nnx.Conv(4, 8, conv_general_dilated=function, rngs=nnx.Rngs(0), **settings)
    )
    graphdef, params = nnx.split(layer)

    def run(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
        return y, *vjp(y)

    sizes = (7, 8, 6)[: len(settings["kernel_size"])]
    x = jax.ShapeDtypeStruct((2, *sizes, 4), jnp.float32)
    return str(jax.make_jaxpr(run)(params, x))


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_convolution_is_jaxs_own(name: str) -> None:
    jaxs = program(lax.conv_general_dilated, OTHERS[name])
    assert program(conv_general_dilated, OTHERS[name]) == jaxs


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "options"),
    [
        ((2, 3, 7, 8), (4, 3, 3, 3), {}),
        ((2, 3, 7, 8), (3, 3, 3, 4), {"dimension_numbers": ("NCHW", "HWIO", "NHWC")}),
        ((2, 7, 8, 3), (3, 3, 3, 4), {"dimension_numbers": NHWC, "batch_group_count": 2}),
    ],
    ids=["NCHW, the default", "NCHW to NHWC", "groups of the batch"],
)
def test_so_is_one_that_no_layer_asks_for(
    x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    def trace(function: Convolution) -> str:
        shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x_shape, kernel_shape))
        return str(
            jax.make_jaxpr(lambda x, kernel: function(x, kernel, (2, 2), "SAME", **options))(
                *shapes
            )
        )

    assert trace(conv_general_dilated) == trace(lax.conv_general_dilated)


@pytest.mark.parametrize("name", ["dilated kernel", "dilated image"])
def test_without_its_options_it_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "is_ordinary", lambda *_, **__: True)
    jaxs = program(lax.conv_general_dilated, OTHERS[name])
    assert program(conv_general_dilated, OTHERS[name]) != jaxs


def test_an_ordinary_one_is_this_modules() -> None:
    """An option that a later Flax passes by default would turn its fast gradients off."""
    assert "name=convolve" in program(conv_general_dilated, {})


@pytest.mark.parametrize(
    ("precision", "text"),
    [
        ("highest", "(Precision.HIGHEST, Precision.HIGHEST)"),
        (("highest", "high"), "(Precision.HIGHEST, Precision.HIGH)"),
    ],
    ids=["one for both", "one for each"],
)
def test_precision_is_honoured_in_the_gradients_too(precision: Any, text: str) -> None:
    ours = program(conv_general_dilated, {"precision": precision})
    assert "name=convolve" in ours
    assert ours.count(f"precision={text}") == 3


def wider(function: Convolution) -> list[np.ndarray]:
    """A convolution of float32 with a result of float64, and its gradients.

    The numbers have 14 bits, and products of two more than float32 holds.
    """

    def run(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        options = {"dimension_numbers": NHWC, "preferred_element_type": jnp.float64}
        y, vjp = jax.vjp(
            lambda *args: function(*args, (2, 2), ((1, 1), (1, 1)), **options), x, kernel
        )
        return y, *vjp(2**12 * jnp.asarray(*integers(y.shape)) + 1)

    arrays = integers((2, 8, 8, 3), (3, 3, 3, 4))
    return compiled(run, *((2**12 * array + 1).astype(np.float32) for array in arrays))


def test_a_wider_result_is_honoured_in_the_gradients_too() -> None:
    ours, theirs = wider(conv_general_dilated), wider(lax.conv_general_dilated)
    assert [array.dtype.name for array in ours] == ["float64", "float32", "float32"]
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_gradients_of_a_wider_result_in_float32_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(strides: Pair, padding: Any, precision: Any, _: Any, *args: Any) -> Any:
        residuals, dy = args
        return backward(strides, padding, precision, None, residuals, dy.astype(jnp.float32))

    backward = convolve.bwd
    monkeypatch.setattr(convolve, "bwd", mutant)
    (y, *ours), (z, *theirs) = wider(conv_general_dilated), wider(lax.conv_general_dilated)
    np.testing.assert_array_equal(y, z)
    for a, b in zip(ours, theirs, strict=True):
        assert not np.array_equal(a, b)


def test_a_sharding_of_the_result_is_honoured() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    x, kernel = map(jnp.asarray, integers((2, 5, 5, 3), (3, 3, 3, 4)))
    with jax.set_mesh(mesh):
        y = conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, out_sharding=P("data")
        )
    assert y.sharding.spec == P("data", None, None, None)


def test_an_unknown_option_is_an_error() -> None:
    x, kernel = map(jnp.asarray, integers((2, 5, 5, 3), (3, 3, 3, 4)))
    with pytest.raises(TypeError, match="dilation"):
        conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, dilation=2)
