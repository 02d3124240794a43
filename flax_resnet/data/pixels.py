"""What becomes of the pixels that a step sees: numbers, cropped, mirrored and mixed.

Runs inside the compiled step, on the device. Which examples, crops, flips and mixtures a step sees
is drawn on the host (`order.py`).
"""

import base64
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from flax_resnet import platforms
from flax_resnet.config import Preprocess
from flax_resnet.data.examples import Examples
from flax_resnet.data.order import Draw, Mix

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FROM_TRAINING_IMAGES = (Preprocess.MEAN_IMAGE, Preprocess.STANDARDIZE)
# Preprocessings whose constants are no settings.
NAMED = tuple(one for one in Preprocess if one is not Preprocess.CONSTANTS)


class Batch(NamedTuple):
    """Preprocessed images and their classes; label -1 marks padding, which counts nowhere.

    A mixed image has two classes: `label` by its share, and `other` by the rest.
    """

    image: Float[Array, "b h w 3"]
    label: Int[Array, " b"]
    other: Int[Array, " b"] | None = None
    share: Float[Array, " b"] | None = None


class Normalization(NamedTuple):
    """x * scale, less `mean` (or each image's own channel mean), divided by std."""

    scale: float
    mean: Float[np.ndarray, "..."] | None  # None: each image's own
    std: Float[np.ndarray, " 3"]

    def to_dict(self) -> dict[str, Any]:
        """The constants as JSON knows them, to the last bit."""
        mean = None if self.mean is None else _to_json(self.mean)
        return {"scale": self.scale, "mean": mean, "std": _to_json(self.std)}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Normalization":
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError for anything else."""
        mean = None if tree["mean"] is None else _from_json(tree["mean"])
        return cls(tree["scale"], mean, _from_json(tree["std"]))


def _to_json(array: np.ndarray) -> dict[str, Any]:
    """An array's shape, and its numbers as base64 of little-endian float64."""
    content = base64.b64encode(np.asarray(array, "<f8").tobytes()).decode()
    return {"shape": list(array.shape), "float64": content}


def _from_json(tree: dict[str, Any]) -> np.ndarray:
    numbers = np.frombuffer(base64.b64decode(tree["float64"]), "<f8")
    return numbers.reshape(tree["shape"]).copy()  # PyTorch warns of what cannot be written to


def make_normalization(
    preprocess: Preprocess, train: UInt8[np.ndarray, "n h w 3"] | None = None
) -> Normalization:
    """The constants of a preprocessing.

    Args:
        train: the training images, for those of FROM_TRAINING_IMAGES.

    Raises:
        ValueError: they are needed and not given.
    """
    ones = np.ones(3)
    if preprocess is Preprocess.OWN_MEAN:
        return Normalization(1 / 255, None, ones)
    if preprocess is Preprocess.IMAGENET:
        return Normalization(1 / 255, np.array(IMAGENET_MEAN), np.array(IMAGENET_STD))
    if preprocess is Preprocess.CONSTANTS:
        raise ValueError("the constants are data.mean and data.std: see source.normalization")
    if train is None:
        raise ValueError(
            f"the constants of {preprocess.value} come from training images: give them"
        )
    if preprocess is Preprocess.MEAN_IMAGE:
        return Normalization(1.0, train.mean(0, dtype=np.float64), ones)
    mean = train.mean((0, 1, 2), dtype=np.float64) / 255
    square = np.square(train, dtype=np.float32).mean((0, 1, 2), dtype=np.float64) / 255**2
    return Normalization(1 / 255, mean, np.sqrt(square - mean**2))


def normalize(
    image: UInt8[Array, "b h w 3"], constants: Normalization, dtype: DTypeLike
) -> Float[Array, "b h w 3"]:
    """Pixels as numbers.

    With one mean for each channel they are looked up: XLA would rewrite the quotients, and
    torchvision's bits be lost.
    """
    if constants.mean is not None and constants.mean.ndim == 1:
        return jnp.asarray(table(constants, dtype))[image, np.arange(3)]
    x = image.astype(dtype) * constants.scale
    if constants.mean is None:
        mean = x.mean((1, 2), keepdims=True)
    else:
        mean = jnp.asarray(constants.mean, dtype)
    return (x - mean) / jnp.asarray(constants.std, dtype)


def table(constants: Normalization, dtype: DTypeLike) -> Float[np.ndarray, "256 3"]:
    """What each level of each channel becomes: (x / 255 - mean) / std, rounded as NumPy does."""
    levels = np.arange(256, dtype=dtype)[:, None] / np.asarray(1 / constants.scale, dtype)
    return (levels - np.asarray(constants.mean, dtype)) / constants.std.astype(dtype)


def shift_colours(
    image: Float[Array, "b h w 3"],
    colour: Float32[Array | np.ndarray, "b 3"] | None,
    constants: Normalization,
) -> Float[Array, "b h w 3"]:
    """Each image, which is normalised, as if a colour had been added to all of its pixels before.

    Args:
        colour: of 0..1.
    """
    if colour is None:
        return image
    unit = jnp.asarray(255 * constants.scale / constants.std, image.dtype)
    return image + (jnp.asarray(colour, image.dtype) * unit)[:, None, None]


def crop_and_flip(
    image: Float[Array, "b h w 3"],
    offset: Int[Array, "b 2"],
    flip: Bool[Array, " b"],
    pad: int,
) -> Float[Array, "b h w 3"]:
    """Each image cut from its zero-padded self, then mirrored left to right where `flip`."""
    cut = slice_each if platforms.on_cpu() else select_shifted
    image = cut(image, offset, pad)
    return jnp.where(flip[:, None, None, None], image[:, :, ::-1], image)


def slice_each(
    image: Float[Array, "b h w 3"], offset: Int[Array, "b 2"], pad: int
) -> Float[Array, "b h w 3"]:
    """Each image cut from its zero-padded self: one image after another, as memory is copied."""
    shape = image.shape[1:]
    padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corner = jnp.pad(offset, ((0, 0), (0, 1)))  # down, right, channel 0
    return jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, at, shape))(padded, corner)


def select_shifted(
    image: Float[Array, "b h w 3"], offset: Int[Array, "b 2"], pad: int
) -> Float[Array, "b h w 3"]:
    """The same for devices that compute on all images at once, TPUs above all.

    Each image is selected from all the places where it could be cut, first of the rows, then of the
    columns.
    """
    for axis in (1, 2):
        size = image.shape[axis]
        padded = jnp.pad(image, [(pad, pad) if i == axis else (0, 0) for i in range(4)])
        at = offset[:, axis - 1, None, None, None]
        image = jax.lax.slice_in_dim(padded, 0, size, axis=axis)
        for start in range(1, 2 * pad + 1):
            shifted = jax.lax.slice_in_dim(padded, start, start + size, axis=axis)
            image = jnp.where(at == start, shifted, image)
    return image


def mix(
    image: Float[Array, "b h w 3"],
    other: Float[Array, "b h w 3"],
    share: Float[Array, " b"],
    box: Int[Array, "b 4"],
) -> Float[Array, "b h w 3"]:
    """Each image with its box (top, left, bottom, right) out of the other one: CutMix.

    Where the box is empty, share image + (1 - share) other: mixup.
    """
    top, left, bottom, right = (side[:, None] for side in box.T)
    row, column = (jnp.arange(size)[None] for size in image.shape[1:3])
    rows, columns = (top <= row) & (row < bottom), (left <= column) & (column < right)
    inside = rows[:, :, None, None] & columns[:, None, :, None]
    is_cut = ((top < bottom) & (left < right))[:, :, None, None]
    share = share[:, None, None, None]
    blend = image * share + other * (1 - share)
    return jnp.where(is_cut, jnp.where(inside, other, image), blend)


class Seen(NamedTuple):
    """The images that the streamed batch of a step consists of, still as pixels."""

    image: UInt8[Array | np.ndarray, "b h w 3"]
    label: Int[Array | np.ndarray, " b"]


class Streamed(NamedTuple):
    """A streamed batch, and what is to be done with it."""

    drawn: Draw
    images: Seen
    others: Seen | None = None  # that are mixed into them


def training_batch(
    examples: Examples, drawn: Draw, constants: Normalization, pad: int, dtype: DTypeLike
) -> Batch:
    """The examples that `drawn` names, cropped, mirrored and mixed. Runs inside `jit`."""

    def seen(drawn: Draw | Mix) -> Seen:
        image, label = map(jnp.asarray, examples)
        return Seen(image[drawn.indices], label[drawn.indices])

    others = None if drawn.mix is None else seen(drawn.mix)
    return streamed_batch(Streamed(drawn, seen(drawn), others), constants, pad, dtype)


def streamed_batch(batch: Streamed, constants: Normalization, pad: int, dtype: DTypeLike) -> Batch:
    """The images that are given, cropped, mirrored and mixed. Runs inside `jit`."""
    drawn = batch.drawn

    def augmented(drawn: Draw | Mix, images: Seen) -> Array:
        x = normalize(jnp.asarray(images.image), constants, dtype)
        x = shift_colours(x, drawn.colour, constants)
        return crop_and_flip(x, jnp.asarray(drawn.offset), jnp.asarray(drawn.flip), pad)

    image, label = augmented(drawn, batch.images), jnp.asarray(batch.images.label)
    if drawn.mix is None or batch.others is None:
        return Batch(image, label)
    share = jnp.asarray(drawn.mix.share, dtype)
    other = augmented(drawn.mix, batch.others)
    image = mix(image, other, share, jnp.asarray(drawn.mix.box))
    return Batch(image, label, jnp.asarray(batch.others.label), share)


def evaluation_batch(
    examples: Examples, index: Int[Array, " b"], constants: Normalization, dtype: DTypeLike
) -> Batch:
    """The examples at `index`; -1 makes padding. Runs inside `jit`."""
    image, label = map(jnp.asarray, examples)
    return Batch(normalize(image[index], constants, dtype), jnp.where(index < 0, -1, label[index]))
