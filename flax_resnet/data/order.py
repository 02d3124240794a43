"""Which examples a step sees, how each is cropped and mirrored, and what is mixed into it.

Everything random is a pure function of (seed, step), drawn by NumPy on the host as a few integers
per example. So one stream feeds JAX and PyTorch alike, on any number of devices, and resuming needs
the step and nothing else.
"""

import math
import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int

from flax_resnet.config import DataConfig
from flax_resnet.settings import require

MOST_EXAMPLES = 2**31 - 1  # which an index, int32 on the device, can tell apart
ORDER, AUGMENTATION, MIX, SHARE, COLOUR, VIEW = range(6)  # independent streams of random numbers
# The principal components of ImageNet's pixels (a row: red, green or blue) and how far one reaches,
# for pixels of 0..1, as facebookarchive/fb.resnet.torch has them (datasets/imagenet.lua).
COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
REACH = (0.2175, 0.0188, 0.0045)

lock = threading.Lock()

Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two are outside


class Mix(NamedTuple):
    """What is mixed into each image of a batch: the image before it; into the first, the last.

    It is named like the image itself, so that a device finds it without asking another one. Share
    and box are the same for all images of a step.
    """

    indices: Int[np.ndarray, " b"]
    offset: Int[np.ndarray, "b 2"]
    flip: Bool[np.ndarray, " b"]
    share: Float32[np.ndarray, " b"]  # that the image itself, and so its class, keeps
    box: Int[np.ndarray, "b 4"]  # that the other image fills; empty: the two are blended
    colour: Float32[np.ndarray, "b 3"] | None = None


class Draw(NamedTuple):
    """What a step sees: which examples, where each is cropped, and whether it is mirrored."""

    indices: Int[np.ndarray, " b"]
    offset: Int[np.ndarray, "b 2"]  # of the crop's corner in the padded image: down, right
    flip: Bool[np.ndarray, " b"]
    mix: Mix | None = None
    colour: Float32[np.ndarray, "b 3"] | None = None  # added to all pixels of an image, of 0..1


def draw(config: DataConfig, seed: int, step: int, batch_size: int, num_examples: int) -> Draw:
    """What step `step` sees. Each epoch is a new permutation; a batch may straddle two.

    Raises ConfigError for more examples than an int32 can number.
    """
    require(num_examples <= MOST_EXAMPLES, "images", f"at most {MOST_EXAMPLES}", num_examples)
    epoch, position = np.divmod(np.arange(batch_size) + step * batch_size, num_examples)
    index = np.empty(batch_size, np.int32)
    for e in np.unique(epoch):
        index[epoch == e] = permutation(seed, int(e), num_examples)[position[epoch == e]]
    raw = random_integers(seed, AUGMENTATION, step, 3 * batch_size).reshape(3, batch_size)
    offset = (raw[:2].T % np.uint64(2 * config.padding + 1)).astype(np.int32)
    flip = (raw[2] >> np.uint64(63) != 0) & config.flip
    colour = draw_colour(config, seed, step, batch_size) if config.colour else None
    if not config.mixup and not config.cutmix:
        return Draw(index, offset, flip, colour=colour)
    share, box = draw_share(config, seed, step)
    mix = Mix(
        np.roll(index, 1),
        np.roll(offset, 1, 0),
        np.roll(flip, 1),
        np.full(batch_size, share),
        np.tile(np.array(box, np.int32), (batch_size, 1)),
        None if colour is None else np.roll(colour, 1, 0),
    )
    return Draw(index, offset, flip, mix, colour)


def draw_colour(
    config: DataConfig, seed: int, step: int, batch_size: int
) -> Float32[np.ndarray, "b 3"]:
    """AlexNet's shift of each image's colours (Krizhevsky et al. 2012, section 4.1).

    Along each principal component a normal number of deviation config.colour, times its reach.
    """
    generator = np.random.RandomState(philox(seed, COLOUR, step))  # as in draw_share
    alpha = generator.normal(0, config.colour, (batch_size, 3))
    return (alpha[:, None] * REACH * COMPONENTS).sum(2).astype(np.float32)


def draw_share(config: DataConfig, seed: int, step: int) -> tuple[np.float32, Box]:
    """How much of itself every image of the step keeps, and the box that it loses.

    Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019); where both are on, each with probability
    1/2. The share is Beta's rounded to float32, so that one less the share is the same number in
    every framework; CutMix's is what the box, rounded to pixels, really leaves.
    """
    coin, down, right = map(int, random_integers(seed, MIX, step, 3))
    is_cut = config.cutmix > 0 and (config.mixup == 0 or coin >> 63 != 0)
    alpha = config.cutmix if is_cut else config.mixup
    # NumPy keeps the algorithms of a RandomState for ever (NEP 19), those of a Generator not.
    generator = np.random.RandomState(philox(seed, SHARE, step))
    share = np.float32(generator.beta(alpha, alpha))
    if not is_cut:
        return share, (0, 0, 0, 0)
    side = config.side
    box = cut_box(float(share), down % side, right % side, side)
    return np.float32(1 - (box[2] - box[0]) * (box[3] - box[1]) / side**2), box


def cut_box(share: float, down: int, right: int, side: int) -> Box:
    """CutMix's box: a square of 1 - `share` of the image around a pixel, cut off at the edges."""
    half = int(0.5 * math.sqrt(1 - share) * side)
    top, left = max(down - half, 0), max(right - half, 0)
    return top, left, min(down + half, side), min(right + half, side)


def permutation(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    """The order of the examples in an epoch; drawn once, however many threads ask."""
    with lock:
        return drawn_permutation(seed, epoch, num_examples)


@lru_cache(maxsize=2)
def drawn_permutation(seed: int, epoch: int, num_examples: int) -> Int[np.ndarray, " n"]:
    return np.argsort(random_integers(seed, ORDER, epoch, num_examples), kind="stable")


def random_integers(seed: int, stream: int, counter: int, size: int) -> np.ndarray:
    """uint64 of shape (size,): Philox's raw output, which NumPy keeps for ever (NEP 19)."""
    return philox(seed, stream, counter).random_raw(size)


def philox(seed: int, stream: int, counter: int) -> np.random.Philox:
    """The counter is the last word, so that two counters never overlap."""
    return np.random.Philox(key=[seed, stream], counter=[0, 0, 0, counter])
