"""Claim: a photograph's pixels are, to the bit, those that torchvision's own transforms give.

For evaluation and for training, whose random numbers torchvision is handed. Tried on images of
noise, where every pixel of the filter counts, and on real photographs.
"""

import math
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flax_resnet.config import DataConfig
from flax_resnet.data import views
from flax_resnet.data.images import BadImageError, decode
from flax_resnet.data_config import Crop, Dataset, Interpolation
from parity_tests import data_sets, others

RNG = np.random.default_rng(15)
SIZES = [tuple(RNG.integers(3, 200, 2).tolist()) for _ in range(57)] + [(1, 50), (50, 1), (64, 64)]


def photographs(**settings: Any) -> DataConfig:
    return DataConfig(name=Dataset.FOLDER, dir="images", **settings)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def words() -> np.ndarray:
    return RNG.integers(0, 2**64, views.NUM_WORDS, np.uint64)


@pytest.fixture(scope="module")
def transforms() -> Any:
    return others.torchvision("transforms")


def resampling(transforms: Any, interpolation: Interpolation) -> Any:
    return transforms.InterpolationMode(interpolation.value)


@pytest.mark.parametrize("interpolation", Interpolation)
@pytest.mark.parametrize(("resize", "crop"), [(32, 28), (29, 28), (28, 33), (31, 18)])
def test_an_image_is_evaluated_as_by_torchvision(
    transforms: Any, interpolation: Interpolation, resize: int, crop: int
) -> None:
    """Also where the crop is larger than the image, and by an odd number of pixels."""
    config = photographs(resize=resize, crop=crop, interpolation=interpolation)
    theirs = transforms.Compose(
        [
            transforms.Resize(resize, resampling(transforms, interpolation)),
            transforms.CenterCrop(crop),
        ]
    )
    for width, height in SIZES:
        image = noise(width, height)
        found = views.evaluation(image, config)
        assert found.shape == (crop, crop, 3)
        np.testing.assert_array_equal(found, np.asarray(theirs(image)))


def test_a_crop_without_a_resize_is_torchvisions(transforms: Any) -> None:
    config = DataConfig(crop=40)
    for width, height in SIZES:
        image = noise(width, height)
        expected = np.asarray(transforms.CenterCrop(40)(image))
        np.testing.assert_array_equal(views.evaluation(image, config), expected)


@pytest.mark.parametrize("interpolation", Interpolation)
def test_a_random_resized_crop_is_torchvisions(
    transforms: Any, interpolation: Interpolation
) -> None:
    """Of the same box."""
    config = photographs(crop=24, interpolation=interpolation)
    for width, height in SIZES:
        image, drawn = noise(width, height), words()
        left, upper, w, h = views.random_resized_box(width, height, drawn)
        expected = transforms.functional.resized_crop(
            image, upper, left, h, w, [24, 24], resampling(transforms, interpolation)
        )
        found = views.training(image, config, drawn)
        np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.9, 1.0), (0.5, 0.5)])
def test_a_random_box_is_torchvisions(
    transforms: Any, monkeypatch: pytest.MonkeyPatch, area: tuple[float, float]
) -> None:
    """Given the same random numbers, also where it gives up and takes the middle."""
    fallbacks = 0
    for width, height in [*SIZES, (200, 20), (20, 200), (3, 4)] * 3:
        drawn = words()
        given = iter(int(word) for word in drawn[:-2])
        places = iter([int(drawn[-1]), int(drawn[-2])])  # torchvision's order: upper, left

        def uniform(low: float, high: float, given: Iterator[int] = given) -> Any:
            value = float(low) + (float(high) - float(low)) * ((next(given) >> 11) * 2.0**-53)
            return types.SimpleNamespace(item=lambda: value)

        def randint(low: int, high: int, size: Any, places: Iterator[int] = places) -> Any:
            value = low + (next(places) * (high - low) >> 64)
            return types.SimpleNamespace(item=lambda: value)

        fake = types.SimpleNamespace(
            tensor=np.array,
            log=np.log,
            exp=lambda x: types.SimpleNamespace(item=lambda: math.exp(x.item())),
            empty=lambda n, uniform=uniform: types.SimpleNamespace(uniform_=uniform),
            randint=randint,
        )
        with monkeypatch.context() as patch:
            patch.setattr(transforms.transforms, "torch", fake)
            image = Image.new("RGB", (width, height))
            upper, left, h, w = transforms.RandomResizedCrop.get_params(image, area, [3 / 4, 4 / 3])
        assert views.random_resized_box(width, height, drawn, area) == (left, upper, w, h)
        fallbacks += next(places, None) is not None
    assert fallbacks >= 3, "no box was the middle of the image"


def test_boxes_are_spread_over_area_ratio_and_place() -> None:
    """The least, the largest and the mean area; a ratio below 1 as often as above; both ends."""
    boxes = [views.random_resized_box(1000, 1000, words()) for _ in range(2000)]
    left, _, width, height = np.array(boxes).T
    share = width * height / 1e6
    assert share.min() < 0.1
    assert share.max() > 0.95
    # Large parts that are not square do not fit, so that the mean is below the middle, 0.54.
    assert 0.45 < share.mean() < 0.54
    assert 0.45 < (width < height).mean() < 0.55
    assert 0.45 < (left / (1000 - width + 1)).mean() < 0.55


def test_scale_jitter_is_a_square_of_the_resized_image() -> None:
    """All short sides and all places are drawn, each with its share."""
    config = photographs(crop=6, train_crop=Crop.SCALE_JITTER, jitter=(7, 9))
    image = noise(40, 20)
    parts = {
        side: np.asarray(views.resize(image, side, config.interpolation)) for side in (7, 8, 9)
    }
    places = {
        part[y : y + 6, x : x + 6].tobytes(): (side, y, x)
        for side, part in parts.items()
        for y in range(part.shape[0] - 5)
        for x in range(part.shape[1] - 5)
    }
    drawn = [places[views.training(image, config, words()).tobytes()] for _ in range(1500)]
    assert set(drawn) == set(places.values())
    sides = np.bincount([side for side, _, _ in drawn], minlength=10)[7:]
    assert sides.min() > 430, "the sides are as likely as one another: 500 each, deviation 18"


@pytest.mark.parametrize("train_crop", [Crop.PAD, Crop.CENTRE])
def test_other_training_images_are_as_in_evaluation(train_crop: Crop) -> None:
    config, image = photographs(resize=20, crop=16, train_crop=train_crop), noise(50, 30)
    found = views.training(image, config, words())
    np.testing.assert_array_equal(found, views.evaluation(image, config))


def test_a_view_is_a_function_of_its_words() -> None:
    image, drawn = noise(60, 60), words()
    for train_crop in (Crop.RANDOM_RESIZED, Crop.SCALE_JITTER):
        config = photographs(crop=16, train_crop=train_crop, jitter=(20, 40))
        first, second, other = (views.training(image, config, w) for w in (drawn, drawn, words()))
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, other)


def test_the_ten_crops_are_torchvisions(transforms: Any) -> None:
    config = photographs(resize=32, crop=27)
    theirs = transforms.Compose([transforms.Resize(32), transforms.TenCrop(27)])
    for width, height in SIZES[:20]:
        image = noise(width, height)
        expected = np.stack([np.asarray(part) for part in theirs(image)])
        np.testing.assert_array_equal(views.ten_crops(image, config), expected)
    with pytest.raises(BadImageError, match="40 x 20 pixels, too few for crops of 27"):
        views.ten_crops(noise(40, 20), DataConfig(crop=27))


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((500, 300), 64, (96, 64)),  # of 106: 5 pixels off either side
        ((300, 500), 64, (64, 96)),
        ((70, 64), 64, (64, 64)),
        ((52, 50), 50, (50, 50)),  # 32 would be less than the short side
    ],
)
def test_a_whole_image_is_cut_to_a_multiple_of_32(
    size: tuple[int, int], short_side: int, expected: tuple[int, int]
) -> None:
    """In the middle of its long side."""
    image = noise(*size)
    found = views.whole(image, short_side, Interpolation.BILINEAR)
    assert found.shape == (expected[1], expected[0], 3)
    resized = np.asarray(views.resize(image, short_side, Interpolation.BILINEAR))
    top, left = (np.array(resized.shape[:2]) - found.shape[:2]) // 2
    part = resized[top : top + expected[1], left : left + expected[0]]
    np.testing.assert_array_equal(found, part)


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1)])
def test_a_line_does_not_fill_the_memory(size: tuple[int, int]) -> None:
    """Resized, it would have 13 thousand million pixels."""
    with pytest.raises(BadImageError, match=f"{size[0]} x {size[1]} pixels, too long and narrow"):
        views.evaluation(Image.new("RGB", size), photographs())


@pytest.mark.parametrize(
    ("resize", "interpolation"),
    [(256, Interpolation.BILINEAR), (232, Interpolation.BILINEAR), (235, Interpolation.BICUBIC)],
)
def test_real_photographs_are_torchvisions_from_the_file_on(
    transforms: Any, resize: int, interpolation: Interpolation
) -> None:
    """The presets of torchvision's two generations, and of timm: one photograph of each class."""
    config = photographs(resize=resize, interpolation=interpolation)
    theirs = transforms.Compose(
        [
            transforms.Resize(resize, resampling(transforms, interpolation)),
            transforms.CenterCrop(224),
        ]
    )
    folders = sorted((data_sets.need_photos() / "train").iterdir())
    for folder in folders:
        path = min(folder.iterdir())
        with Image.open(path) as image:
            expected = np.asarray(theirs(image.convert("RGB")))
        found = views.evaluation(decode(path.read_bytes()), config)
        np.testing.assert_array_equal(found, expected)
