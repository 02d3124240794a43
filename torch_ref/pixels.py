"""What becomes of the pixels that a step sees; the draws are those of `flax_resnet/data/order.py`.

Which examples, offsets, flips, shares and boxes a step sees is NumPy's doing on the host, the same
for both frameworks; only what is done with the pixels is mirrored here.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Batch(NamedTuple):
    """Preprocessed images (b, 3, h, w) and their classes (b,).

    A mixed image has two classes: `label` by its share, and `other` by the rest.
    """

    image: Tensor
    label: Tensor
    other: Tensor | None = None
    share: Tensor | None = None


def normalize(
    image: np.ndarray | Tensor,
    scale: float,
    mean: np.ndarray | None,
    std: np.ndarray,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 pixels (b, h, w, 3) as numbers (b, 3, h, w); mean None: each image's own.

    With one mean for each channel as torchvision's ToTensor and Normalize do it.
    """
    x = torch.as_tensor(image).to(dtype)
    x = x / (1 / scale) if mean is not None and mean.ndim == 1 else x * scale
    like = {"dtype": dtype, "device": x.device}
    own = x.mean((1, 2), keepdim=True)
    x = (x - (own if mean is None else torch.as_tensor(mean, **like))) / torch.as_tensor(
        std, **like
    )
    return x.permute(0, 3, 1, 2).contiguous()


def shift_colours(image: Tensor, colour: np.ndarray, scale: float, std: np.ndarray) -> Tensor:
    """Each normalised image as if a colour had been added to all of its pixels before."""
    unit = torch.as_tensor(255 * scale / std).to(image)
    return image + (torch.as_tensor(colour).to(image) * unit)[:, :, None, None]


def crop_and_flip(image: Tensor, offset: np.ndarray, flip: np.ndarray, pad: int) -> Tensor:
    """Each image cut from its zero-padded self, then mirrored left to right where `flip`."""
    height, width = image.shape[2:]
    padded = F.pad(image, (pad, pad, pad, pad))
    down, right, mirror = (torch.as_tensor(x, device=image.device) for x in (*offset.T, flip))
    rows = down[:, None] + torch.arange(height, device=image.device)
    columns = right[:, None] + torch.arange(width, device=image.device)
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    examples = torch.arange(len(image), device=image.device)[:, None, None]
    # (b, h, w, 3), and so (b, 3, h, w) in PyTorch's channels_last layout
    cut = padded.permute(0, 2, 3, 1)[examples, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)


def mix(image: Tensor, other: Tensor, share: Tensor, box: np.ndarray | Tensor) -> Tensor:
    """Each image with its box (top, left, bottom, right) out of the other one: CutMix.

    Where the box is empty, share image + (1 - share) other: mixup.
    """
    top, left, bottom, right = torch.as_tensor(box, device=image.device).T[:, :, None]
    row, column = (torch.arange(size, device=image.device) for size in image.shape[2:])
    rows, columns = (top <= row) & (row < bottom), (left <= column) & (column < right)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    is_cut = ((top < bottom) & (left < right))[:, :, None, None]
    share = share[:, None, None, None]
    blend = image * share + other * (1 - share)
    return torch.where(is_cut, torch.where(inside, other, image), blend)
