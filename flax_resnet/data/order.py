"""Which examples a step sees, and how each is cropped and mirrored.

Everything random is a pure function of (seed, step), drawn by NumPy on the host as a few integers
per example. So one stream feeds JAX and PyTorch alike, on any number of devices, and resuming needs
the step and nothing else.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from flax_resnet.config import DataConfig
from flax_resnet.settings import require

MOST_EXAMPLES = 2**31 - 1  # which an index, int32 on the device, can tell apart
ORDER, AUGMENTATION = 0, 1  # independent streams of random numbers


class Draw(NamedTuple):
    """What a step sees: which examples, where each is cropped, and whether it is mirrored."""

    indices: Int[np.ndarray, " b"]
    offset: Int[np.ndarray, "b 2"]  # of the crop's corner in the padded image: down, right
    flip: Bool[np.ndarray, " b"]


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
