"""What becomes of the pixels that a step sees; the draws are those of `flax_resnet/data.py`.

Which examples, offsets and flips a step sees is NumPy's doing on the host, the same for both
frameworks; only what is done with the pixels is mirrored here.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Batch(NamedTuple):
    """Preprocessed images (b, 3, h, w) and their classes (b,)."""

    image: Tensor
    label: Tensor


def normalize(
    image: np.ndarray,
    scale: float,
    mean: np.ndarray | None,
    std: np.ndarray,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 pixels (b, h, w, 3) as numbers (b, 3, h, w); mean None: each image's own."""
    x = torch.tensor(image).to(dtype) * scale
    own = x.mean((1, 2), keepdim=True)
    x = (x - (own if mean is None else torch.tensor(mean).to(dtype))) / torch.tensor(std).to(dtype)
    return x.permute(0, 3, 1, 2).contiguous()


def crop_and_flip(image: Tensor, offset: np.ndarray, flip: np.ndarray, pad: int) -> Tensor:
    """Each image cut from its zero-padded self, then mirrored left to right where `flip`."""
    height, width = image.shape[2:]
    padded = F.pad(image, (pad, pad, pad, pad))
    crops = [
        x[:, down : down + height, right : right + width]
        for x, (down, right) in zip(padded, offset.tolist(), strict=True)
    ]
    image = torch.stack(crops)
    return torch.where(torch.tensor(flip)[:, None, None, None], image.flip(3), image)
