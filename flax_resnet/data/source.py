"""The splits of the data set that a config names, and the constants of its preprocessing."""

from collections.abc import Collection

from flax_resnet.config import DataConfig, Dataset, ResNetConfig
from flax_resnet.data import cifar10, digits
from flax_resnet.data.examples import Examples
from flax_resnet.data.pixels import FROM_TRAINING_IMAGES, Normalization, make_normalization
from flax_resnet.errors import ConfigError
from flax_resnet.settings import require

CLASSES = {Dataset.CIFAR10: 10, Dataset.DIGITS: 10}
SPLITS = ("train", "test", "validation")


def load(config: DataConfig, splits: Collection[str] = SPLITS) -> dict[str, Examples]:
    """Those of "train", "test" and "validation" that are asked for and that there are.

    "validation" is the last `config.validation` examples of the training images, and "train" what
    is left of them. Only what is asked for is read.

    Raises:
        DatasetError: the dataset is missing or damaged.
        ConfigError: more examples are to be held out than there are.
    """
    config.validate()
    files = [split for split in ("train", "test") if split in splits]
    if "validation" in splits and config.validation and "train" not in files:
        files.append("train")
    is_digits = config.name is Dataset.DIGITS
    found = digits.load() if is_digits else cifar10.load(config.dir, files)
    if config.validation and "train" in found:
        train = found["train"]
        size = len(train.label) - config.validation
        if size < 1:
            raise ConfigError(
                f"data.validation must be below {len(train.label)}, the size of the training "
                f"split, got {config.validation}"
            )
        found["train"] = Examples(train.image[:size], train.label[:size])
        found["validation"] = Examples(train.image[size:], train.label[size:])
    return {split: found[split] for split in SPLITS if split in splits and split in found}


def is_here(config: DataConfig) -> bool:
    """Whether `load` needs no download."""
    return config.name is Dataset.DIGITS or cifar10.is_here(config.dir)


def check_network(config: DataConfig, model: ResNetConfig) -> None:
    """Raises ConfigError for a network of other classes or channels than the images have."""
    classes, given = CLASSES[config.name], model.num_classes
    if given != classes:
        raise ConfigError(
            f"model.num_classes must be {classes}, the classes of {config.name.value}, got "
            f"{given}; a network for them has --config.model.num_classes={classes}"
        )
    rule = "3, as the images of every data set have"
    require(model.image_channels == 3, "model.image_channels", rule, model.image_channels)


def normalization(config: DataConfig) -> Normalization:
    """The constants of `config.preprocess`.

    The training images are read only where the constants come from them. Raises as `load` does.
    """
    if config.preprocess not in FROM_TRAINING_IMAGES:
        return make_normalization(config.preprocess)
    return make_normalization(config.preprocess, load(config, ("train",))["train"].image)
