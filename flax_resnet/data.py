"""Which examples a step sees, and what becomes of their pixels.

Everything random here is a pure function of (seed, step), drawn by NumPy on the host as a few
integers per example; the pixels are cut and flipped inside the compiled step. So one stream feeds
JAX and PyTorch alike, on any number of devices, and resuming needs the step and nothing else.
"""

from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from flax_resnet import cifar10
from flax_resnet.cifar10 import Examples
from flax_resnet.config import DataConfig, Dataset, Preprocess
from flax_resnet.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ORDER, AUGMENTATION = 0, 1  # independent streams of random numbers


class Draw(NamedTuple):
    """What a step sees: which examples, where each is cropped, and whether it is mirrored."""

    indices: Int[np.ndarray, " b"]
    offset: Int[np.ndarray, "b 2"]  # of the crop's corner in the padded image: down, right
    flip: Bool[np.ndarray, " b"]


class Batch(NamedTuple):
    """Preprocessed images and their classes; label -1 marks padding, which counts nowhere."""

    image: Float[Array, "b h w 3"]
    label: Int[Array, " b"]


class Normalization(NamedTuple):
    """x * scale, less `mean` (or each image's own channel mean), divided by std."""

    scale: float
    mean: Float[np.ndarray, "..."] | None  # None: each image's own
    std: Float[np.ndarray, " 3"]


def load(config: DataConfig) -> dict[str, Examples]:
    """The splits "train" and "test", and "validation" if `config.validation` examples are held out.

    Raises:
        DatasetError: the dataset is missing or damaged.
        ConfigError: more examples are to be held out than there are.
    """
    config.validate()
    is_digits = config.name is Dataset.DIGITS
    splits = digits() if is_digits else cifar10.load(config.dir)
    train = splits["train"]
    if config.validation:
        size = len(train.label) - config.validation
        if size < 1:
            raise ConfigError(
                f"data.validation must be below {len(train.label)}, the size of the training "
                f"split, got {config.validation}"
            )
        splits["train"] = Examples(train.image[:size], train.label[:size])
        splits["validation"] = Examples(train.image[size:], train.label[size:])
    return splits


def digits() -> dict[str, Examples]:
    """scikit-learn's 1,797 scans of handwritten digits, 8x8, enlarged to 32x32x3.

    Every fifth is a test image: 1,437 train, 360 test.
    """
    from sklearn.datasets import load_digits  # its import takes over a second

    pixels, label = load_digits(return_X_y=True)
    image = np.round(np.reshape(pixels, (-1, 8, 8)) * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(x).resize((32, 32), Image.Resampling.BICUBIC) for x in image]
    image = np.repeat(np.stack([np.asarray(x) for x in large])[..., None], 3, -1)
    label = np.asarray(label, np.int32)
    test = np.arange(len(label)) % 5 == 0
    return {
        "train": Examples(image[~test], label[~test]),
        "test": Examples(image[test], label[test]),
    }


def draw(config: DataConfig, seed: int, step: int, batch_size: int, num_examples: int) -> Draw:
    """What step `step` sees. Each epoch is a new permutation; a batch may straddle two."""
    epoch, position = np.divmod(np.arange(batch_size) + step * batch_size, num_examples)
    index = np.empty(batch_size, np.int32)
    for e in np.unique(epoch):
        index[epoch == e] = permutation(seed, int(e), num_examples)[position[epoch == e]]
    raw = random_integers(seed, AUGMENTATION, step, 3 * batch_size).reshape(3, batch_size)
    offset = (raw[:2].T % np.uint64(2 * config.pad + 1)).astype(np.int32)
    return Draw(index, offset, (raw[2] >> np.uint64(63) != 0) & config.flip)


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    """The order of the examples in an epoch."""
    return np.argsort(random_integers(seed, ORDER, epoch, num_examples), kind="stable")


def random_integers(seed: int, stream: int, counter: int, size: int) -> np.ndarray:
    """uint64 of shape (size,): Philox's raw output, which NumPy keeps for ever (NEP 19)."""
    start = [0, 0, 0, counter]  # the last word, so that two counters never overlap
    return np.random.Philox(key=[seed, stream], counter=start).random_raw(size)


def make_normalization(
    preprocess: Preprocess, train: UInt8[np.ndarray, "n h w 3"]
) -> Normalization:
    """The constants of a preprocessing, from the training images where it needs them."""
    ones = np.ones(3)
    match preprocess:
        case Preprocess.PAPER:
            return Normalization(1.0, train.mean(0, dtype=np.float64), ones)
        case Preprocess.REFERENCE:
            return Normalization(1 / 255, None, ones)
        case Preprocess.AKAMASTER:
            return Normalization(1 / 255, np.array(IMAGENET_MEAN), np.array(IMAGENET_STD))
        case Preprocess.STANDARDIZE:
            mean = train.mean((0, 1, 2), dtype=np.float64) / 255
            square = np.square(train, dtype=np.float32).mean((0, 1, 2), dtype=np.float64) / 255**2
            return Normalization(1 / 255, mean, np.sqrt(square - mean**2))


def normalize(
    image: UInt8[Array, "b h w 3"], constants: Normalization, dtype: DTypeLike
) -> Float[Array, "b h w 3"]:
    """Pixels as numbers."""
    x = image.astype(dtype) * constants.scale
    if constants.mean is None:
        mean = x.mean((1, 2), keepdims=True)
    else:
        mean = jnp.asarray(constants.mean, dtype)
    return (x - mean) / jnp.asarray(constants.std, dtype)


def crop_and_flip(
    image: Float[Array, "b h w 3"],
    offset: Int[Array, "b 2"],
    flip: Bool[Array, " b"],
    pad: int,
) -> Float[Array, "b h w 3"]:
    """Each image cut from its zero-padded self, then mirrored left to right where `flip`."""
    shape = image.shape[1:]
    padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corner = jnp.pad(offset, ((0, 0), (0, 1)))  # down, right, channel 0
    image = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, at, shape))(padded, corner)
    return jnp.where(flip[:, None, None, None], image[:, :, ::-1], image)


def training_batch(
    examples: Examples, drawn: Draw, constants: Normalization, pad: int, dtype: DTypeLike
) -> Batch:
    """The examples that `drawn` names, cropped and mirrored as it says. Runs inside `jit`."""
    indices, offset, flip = map(jnp.asarray, drawn)
    image, label = map(jnp.asarray, examples)
    image = normalize(image[indices], constants, dtype)
    return Batch(crop_and_flip(image, offset, flip, pad), label[indices])


def evaluation_batch(
    examples: Examples, index: Int[Array, " b"], constants: Normalization, dtype: DTypeLike
) -> Batch:
    """The examples at `index`; -1 makes padding. Runs inside `jit`."""
    image, label = map(jnp.asarray, examples)
    return Batch(normalize(image[index], constants, dtype), jnp.where(index < 0, -1, label[index]))
