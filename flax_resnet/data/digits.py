"""scikit-learn's handwritten digits: a data set that needs no download."""

import numpy as np
from PIL import Image

from flax_resnet.data.examples import Examples


def load() -> dict[str, Examples]:
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
