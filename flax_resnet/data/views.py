"""What a network sees of a photograph: cut out and resized on the host, by PIL, as uint8.

To the bit what torchvision's transforms make of the same picture, given the same random numbers.
Mirroring and normalisation are left to the device (`pixels`).
"""

import math

import numpy as np
from jaxtyping import UInt8, UInt64
from PIL import Image

from flax_resnet.data.images import MOST_PIXELS, BadImageError
from flax_resnet.data_config import Crop, DataConfig, Interpolation

NUM_TRIES = 10  # of torchvision's RandomResizedCrop, before it takes the middle
NUM_WORDS = 2 * NUM_TRIES + 2  # random ones, of 64 bits, that a training image needs
RATIOS = 3 / 4, 4 / 3  # least and largest width over height of a random part
STRIDE = 32  # of ImageNet's networks: the sides of `whole` are multiples of it

Pixels = UInt8[np.ndarray, "h w 3"]
Words = UInt64[np.ndarray, " 22"]  # NUM_WORDS of them
Box = tuple[int, int, int, int]  # left, upper, width, height

_RESAMPLING = {
    Interpolation.BILINEAR: Image.Resampling.BILINEAR,
    Interpolation.BICUBIC: Image.Resampling.BICUBIC,
}


def evaluation(image: Image.Image, config: DataConfig) -> Pixels:
    """The middle of the resized image: torchvision's Resize and CenterCrop.

    Zeros are around an image that is smaller than the crop. Raises as `resize` does.
    """
    side, crop, _ = config.view
    if side is not None:
        image = resize(image, side, config.interpolation)
    return np.asarray(image if crop is None else centre_crop(image, crop, crop))


def training(image: Image.Image, config: DataConfig, words: Words) -> Pixels:
    """What a training step sees, before it is mirrored or, with Crop.PAD, padded and cropped.

    Args:
        words: uniformly random; the view is a function of them and of the image. With Crop.PAD and
            Crop.CENTRE they change nothing.

    Raises as `resize` does.
    """
    _, crop, train_crop = config.view
    if train_crop in (Crop.PAD, Crop.CENTRE):
        return evaluation(image, config)
    assert crop is not None  # DataConfig.validate
    if train_crop is Crop.SCALE_JITTER:
        low, high = config.jitter
        image = scale_jitter(image, crop, (low, high), config.interpolation, words)
        return np.asarray(image)
    low, high = config.area
    left, upper, width, height = random_resized_box(*image.size, words, (low, high))
    # First the crop, then the resize: resize(box=...) looks at pixels beyond the box.
    part = image.crop((left, upper, left + width, upper + height))
    return np.asarray(part.resize((crop, crop), _RESAMPLING[config.interpolation]))


def resize(image: Image.Image, short_side: int, interpolation: Interpolation) -> Image.Image:
    """The whole image with a short side of so many pixels.

    Raises:
        BadImageError: it is so long and narrow that the result would have more pixels than
            MOST_PIXELS.
    """
    width, height = image.size
    short, long = sorted(image.size)
    long = int(short_side * long / short)
    if short_side * long > MOST_PIXELS:
        raise BadImageError(
            f"{width} x {height} pixels, too long and narrow to resize to {short_side} pixels"
        )
    size = (short_side, long) if width <= height else (long, short_side)
    return image.resize(size, _RESAMPLING[interpolation])


def centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of the image, with zeros around it where the crop is larger: torchvision's."""
    left, upper = _corner(image.width, width), _corner(image.height, height)
    return image.crop((left, upper, left + width, upper + height))


def _corner(size: int, crop: int) -> int:
    """Where the crop begins, on one axis; torchvision pads by another rule than it crops."""
    return round((size - crop) / 2) if crop <= size else -((crop - size) // 2)


def random_resized_box(
    width: int, height: int, words: Words, area: tuple[float, float] = (0.08, 1.0)
) -> Box:
    """A random part of an image: torchvision's RandomResizedCrop, with random numbers from words.

    Up to ten times an area, uniform, and a ratio of the sides, log-uniform in RATIOS, are drawn.
    The first part that fits into the image is put at a random place. If none fits, the part is
    the middle of the image, as large as the ratios allow.

    Args:
        area: least and largest part of the image's.
    """
    low, high = (math.log(ratio) for ratio in RATIOS)
    numbers = [int(word) for word in words]
    for i in range(NUM_TRIES):
        size = width * height * (area[0] + (area[1] - area[0]) * _uniform(numbers[2 * i]))
        ratio = math.exp(low + (high - low) * _uniform(numbers[2 * i + 1]))
        w, h = round(math.sqrt(size * ratio)), round(math.sqrt(size / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = _below(numbers[-2], width - w + 1), _below(numbers[-1], height - h + 1)
            return left, upper, w, h
    w, h = width, height
    if width / height < RATIOS[0]:
        h = round(width / RATIOS[0])
    elif width / height > RATIOS[1]:
        w = round(height * RATIOS[1])
    return (width - w) // 2, (height - h) // 2, w, h


def scale_jitter(
    image: Image.Image,
    crop: int,
    sides: tuple[int, int],
    interpolation: Interpolation,
    words: Words,
) -> Image.Image:
    """The paper's: resized to a random short side, and a random square of it (section 3.4).

    Args:
        sides: least and largest short side; each one between them is as likely.
    """
    short, horizontal, vertical = (int(word) for word in words[:3])
    side = sides[0] + _below(short, sides[1] - sides[0] + 1)
    image = resize(image, side, interpolation)
    left = _below(horizontal, image.width - crop + 1)
    upper = _below(vertical, image.height - crop + 1)
    return image.crop((left, upper, left + crop, upper + crop))


def ten_crops(image: Image.Image, config: DataConfig) -> UInt8[np.ndarray, "10 h w 3"]:
    """Five crops of the resized image and five of its mirror image: the paper's test on ImageNet.

    As torchvision's TenCrop has them: upper left, upper right, lower left, lower right, middle.

    Raises BadImageError for an image smaller than the crop, which the config does not resize, and
    as `resize` does.
    """
    side, crop, _ = config.view
    if side is not None:
        image = resize(image, side, config.interpolation)
    width, height = image.size
    crop = crop or min(image.size)
    if crop > min(image.size):
        raise BadImageError(f"{width} x {height} pixels, too few for crops of {crop}")
    right, lower = width - crop, height - crop
    corners = [(0, 0), (right, 0), (0, lower), (right, lower)]
    corners.append((_corner(width, crop), _corner(height, crop)))
    pixels = np.asarray(image)
    images = pixels, pixels[:, ::-1]
    return np.stack(
        [x[top : top + crop, left : left + crop] for x in images for left, top in corners]
    )


def whole(image: Image.Image, short_side: int, interpolation: Interpolation) -> Pixels:
    """The whole image at a scale, for a network that is run over it as one large convolution.

    The long side is cut in the middle to a multiple of STRIDE, so that the images of a data set
    have a few shapes and not hundreds, each of which is compiled. Raises as `resize` does.
    """
    image = resize(image, short_side, interpolation)
    long = max(image.size)
    long = max(long - long % STRIDE, short_side)
    is_tall = image.height > image.width
    return np.asarray(centre_crop(image, *((short_side, long) if is_tall else (long, short_side))))


def _uniform(word: int) -> float:
    """In [0, 1), of 53 random bits."""
    return (word >> 11) / (1 << 53)


def _below(word: int, count: int) -> int:
    """One of 0 to count - 1."""
    return word * count >> 64
