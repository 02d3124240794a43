"""The splits of the data set that a config names, and the constants of its preprocessing.

A split is resident, two arrays that go to the devices whole, or streamed, images that are decoded
as they are needed. What a network sees is the same.
"""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from flax_resnet.config import Crop, DataConfig, Dataset, Placement, Preprocess, ResNetConfig
from flax_resnet.data import check, cifar, digits, folder, records, views
from flax_resnet.data.encoded import Arrays, Encoded, Images, Part
from flax_resnet.data.examples import Examples
from flax_resnet.data.pixels import FROM_TRAINING_IMAGES, Normalization, make_normalization
from flax_resnet.errors import ConfigError
from flax_resnet.settings import require

Split = Examples | Images

CIFAR = {Dataset.CIFAR10: cifar.CIFAR10, Dataset.CIFAR100: cifar.CIFAR100}
SPLITS = ("train", "test", "validation")
RESIDENT_BYTES = 2**28  # the most that a split may take to be resident without being told
STATISTICS_IMAGES = 2000  # photographs whose mean and deviation are taken
SLOW_IMAGES = 500  # from which it is worth to show how far their decoding is


def load(config: DataConfig, splits: Collection[str] = SPLITS) -> dict[str, Split]:
    """Those of "train", "test" and "validation" that are asked for and that there are.

    Of CIFAR and the digits "validation" is the last `config.validation` training examples. Of
    photographs, which lie in the order of their classes, it is so many evenly spaced ones, and
    they are "test" where there is no other split to test on. "train" is what is left.

    Raises:
        DatasetError: the dataset is missing or damaged.
        ConfigError: more examples are to be held out than there are, or a split cannot be resident.
    """
    config.validate()
    config.require_given()
    found = load_arrays(config, splits) if is_small(config) else load_images(config, splits)
    return {split: placed(config, split, found[split]) for split in SPLITS if split in found}


def is_small(config: DataConfig) -> bool:
    return config.name not in (Dataset.FOLDER, Dataset.TFDS)


def load_arrays(config: DataConfig, splits: Collection[str]) -> dict[str, Split]:
    """CIFAR's and the digits' splits; only what is asked for is read."""
    files = [split for split in ("train", "test") if split in splits]
    if "validation" in splits and config.validation and "train" not in files:
        files.append("train")
    is_digits = config.name is Dataset.DIGITS
    found = digits.load() if is_digits else cifar.load(config.dir, files, CIFAR[config.name])
    if config.validation and "train" in found:
        train = found["train"]
        size = left(config, len(train.label))
        found["train"] = Examples(train.image[:size], train.label[:size])
        found["validation"] = Examples(train.image[size:], train.label[size:])
    return {split: found[split] for split in splits if split in found}


def load_images(config: DataConfig, splits: Collection[str]) -> dict[str, Split]:
    encoded = load_files(config, {*splits, "test"} | ({"train"} if config.validation else set()))
    if "test" not in encoded:
        encoded = load_files(config)
    is_cut = "train" in encoded and (config.validation > 0 or "test" not in encoded)
    needed = {*splits, "train"} if is_cut else splits
    found: dict[str, Images] = {**encoded}
    found |= check.check(config, {name: x for name, x in encoded.items() if name in needed})
    if is_cut:
        held_out = "validation" if "test" in found else "test"
        if held_out in found:
            raise ConfigError(
                "data.validation must be 0 where there is a folder of validation images already, "
                f"got {config.validation}"
            )
        if config.validation or "train" in splits:
            train, size = found["train"], len(found["train"])
            if not config.validation:
                raise ConfigError(
                    f"there is one split of {size} images, and nothing to test on: hold some out "
                    "with --config.data.validation=N"
                )
            left(config, size)
            chosen = np.linspace(0, size - 1, config.validation).round().astype(int)
            found[held_out] = Part(train, chosen)
            found["train"] = Part(train, np.setdiff1d(np.arange(size), chosen))
        else:  # to be evaluated alone
            found = {"test": found["train"]}
    return {split: found[split] for split in splits if split in found}


def load_files(config: DataConfig, splits: Collection[str] = SPLITS) -> Mapping[str, Encoded]:
    """A folder's or TFDS's own splits, whose images nobody has looked at."""
    if config.name is Dataset.FOLDER:
        return folder.load(config)
    return records.load(config, splits)


def left(config: DataConfig, size: int) -> int:
    """How many training examples are not held out. Raises ConfigError if none are."""
    if size <= config.validation:
        raise ConfigError(
            f"data.validation must be below {size}, the size of the training split, got "
            f"{config.validation}"
        )
    return size - config.validation


def placed(config: DataConfig, split: str, found: Split) -> Split:
    """A split as `config.placement` wants it, which None leaves to its size."""
    view = config.view
    if placement(config, split, len(found.label)) is Placement.STREAMED:
        is_array = isinstance(found, Examples)
        return Arrays(found, f"{config.name.value}'s {split} split") if is_array else found
    if isinstance(found, Examples):
        if view.resize is None and view.crop is None:
            return found
        found = Arrays(found, f"{config.name.value}'s {split} split")
    return Examples(evaluation_views(config, found, range(len(found)), split), found.label)


def placement(config: DataConfig, split: str, size: int) -> Placement:
    """Where the images of a split of that size are. Raises ConfigError if they cannot be there."""
    view = config.view
    is_drawn = split == "train" and view.train_crop in (Crop.RANDOM_RESIZED, Crop.SCALE_JITTER)
    if config.placement is Placement.RESIDENT and is_drawn:
        raise ConfigError(
            "data.placement must be streamed with a data.train_crop that cuts each image from its "
            f"own size ({view.train_crop.value}), got resident; pad and centre can be resident"
        )
    if config.placement is None:
        is_large = is_drawn or size * 3 * config.side**2 > RESIDENT_BYTES
        return Placement.STREAMED if is_large else Placement.RESIDENT
    return config.placement


def evaluation_views(
    config: DataConfig, images: Images, indices: Collection[int], what: str
) -> UInt8[np.ndarray, "n h w 3"]:
    """These images as an evaluation sees them, decoded by threads."""

    def view(index: int) -> UInt8[np.ndarray, "h w 3"]:
        return images.seen(index, lambda x: views.evaluation(x, config))

    shape = (len(indices), config.side, config.side, 3)
    found = np.empty(shape, np.uint8)
    with ThreadPoolExecutor(config.num_threads) as pool:
        is_quick = len(indices) < SLOW_IMAGES
        decoded = pool.map(view, indices)
        try:
            bar = tqdm(decoded, f"decoding {what}", len(indices), unit="image", disable=is_quick)
            for i, image in enumerate(bar):
                found[i] = image
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def is_here(config: DataConfig) -> bool:
    """Whether `load` needs no download."""
    if config.name is Dataset.TFDS:
        return records.is_here(config)
    return config.name not in CIFAR or cifar.is_here(config.dir, CIFAR[config.name])


def class_names(config: DataConfig) -> tuple[str, ...]:
    """What the classes are called, in the order of their numbers. Raises as `load` does."""
    config.validate()
    config.require_given()
    if config.name is Dataset.FOLDER:
        return folder.class_names(config)
    if config.name is Dataset.TFDS:
        return records.class_names(config)
    if config.name is Dataset.DIGITS:
        return tuple(map(str, range(10)))
    return CIFAR[config.name].classes


def check_network(config: DataConfig, model: ResNetConfig) -> None:
    """Raises ConfigError for a network of other classes or channels than the images have."""
    classes, given = len(class_names(config)), model.num_classes
    if given != classes:
        raise ConfigError(
            f"model.num_classes must be {classes}, the classes of {config.name.value}, got "
            f"{given}; a network for them has --config.model.num_classes={classes}"
        )
    check_channels(model)


def check_channels(model: ResNetConfig) -> None:
    """Raises ConfigError for a network of other channels than the images have."""
    rule = "3, as the images of every data set have"
    require(model.image_channels == 3, "model.image_channels", rule, model.image_channels)


def normalization(config: DataConfig, train: Split | None = None) -> Normalization:
    """The constants of `config.preprocess`.

    The training images are read only where the constants come from them, of photographs 2,000 that
    are evenly spaced. Raises as `load` does.

    Args:
        train: the training images, if they have been loaded.
    """
    if config.preprocess is Preprocess.CONSTANTS:
        return Normalization(1 / 255, np.array(config.mean), np.array(config.std))
    if config.preprocess not in FROM_TRAINING_IMAGES:
        return make_normalization(config.preprocess)
    if train is None:
        train = load(config, ("train",))["train"]
    return make_normalization(config.preprocess, sample(config, train, STATISTICS_IMAGES))


def first(config: DataConfig, split: Split, number: int) -> UInt8[np.ndarray, "n h w 3"]:
    """The first images of a split as an evaluation sees them."""
    if isinstance(split, Examples):
        return split.image[:number]
    return evaluation_views(config, split, range(min(number, len(split))), "images")


def sample(config: DataConfig, split: Split, number: int) -> UInt8[np.ndarray, "n h w 3"]:
    """Of CIFAR and the digits, as they are, all images; else so many, evenly spaced, or all.

    It does not depend on where the images are.
    """
    size = len(split.label)
    is_as_it_is = is_small(config) and config.view.crop is None
    chosen = np.linspace(0, size - 1, size if is_as_it_is else min(number, size))
    chosen = chosen.round().astype(int)
    if isinstance(split, Arrays) and is_as_it_is:
        return split.pixels
    if isinstance(split, Examples):
        return split.image if len(chosen) == size else split.image[chosen]
    return evaluation_views(config, split, chosen.tolist(), "a sample of the training images")
