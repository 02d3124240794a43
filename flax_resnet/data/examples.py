"""What every data set that fits into memory is: two arrays a split."""

from typing import NamedTuple

import numpy as np

SIZE = 32  # of an image's side, in pixels


class Examples(NamedTuple):
    """The images and labels of one split, in the order of the original archive."""

    image: np.ndarray  # uint8 (n, 32, 32, 3)
    label: np.ndarray  # int32 (n,)
