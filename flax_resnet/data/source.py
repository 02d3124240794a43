"""The splits of the data set that a config names."""

from flax_resnet.config import DataConfig, Dataset
from flax_resnet.data import cifar10, digits
from flax_resnet.data.examples import Examples
from flax_resnet.errors import ConfigError


def load(config: DataConfig) -> dict[str, Examples]:
    """The splits "train" and "test", and "validation" if `config.validation` examples are held out.

    Raises:
        DatasetError: the dataset is missing or damaged.
        ConfigError: more examples are to be held out than there are.
    """
    config.validate()
    is_digits = config.name is Dataset.DIGITS
    splits = digits.load() if is_digits else cifar10.load(config.dir)
    train = splits["train"]
    if config.validation:
        size = len(train.label) - config.validation
        if size < 1:
            raise ConfigError(
                f"data.validation must be below {len(train.label)}, the size of the training "
                f"split, got {config.validation}"
            )
        splits["train"] = Examples(train.image[:size], train.label[:size])
        splits["validation"] = Examples(train.image[size:], train.label[size:])
    return splits
