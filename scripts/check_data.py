"""Finds the images that cannot be read: `python scripts/check_data.py --config.data.dir=DIR`.

DIR is a folder of images, as for `scripts/train_flax.py`; for a set of tensorflow-datasets give
--config.data.name=tfds and --config.data.tfds, too. Every image of every split is decoded, however
many there are. Each that is empty, damaged or no image is a line with its name and the reason; the
exit code is 2 if there are more than --config.data.allow_bad. What was found is remembered: a run
with the same images need not look again.
"""

from flax_resnet import cli
from flax_resnet.config import DataConfig, Dataset, Experiment
from flax_resnet.data import check, source
from flax_resnet.errors import ConfigError, DatasetError

cli.define_overrides(
    "They say which images.",
    ("data.name", "data.dir", "data.tfds", "data.threads", "data.allow_bad"),
)


def main() -> None:
    experiment = Experiment(data=DataConfig(name=Dataset.FOLDER))
    config = cli.override(experiment).data
    if config.name not in (Dataset.FOLDER, Dataset.TFDS):
        raise ConfigError(
            f"--config.data.name must be folder or tfds, got {config.name.value}, whose images are "
            "checked whenever they are read"
        )
    number = 0
    for name, split in source.load_files(config).items():
        found = check.find(split, config.num_threads, name, everything=True)
        for index, reason in found.bad.items():
            print(f"{split.name(index)}: {reason}")
        print(f"{name}: {len(split)} images, {len(found.bad)} cannot be read")
        number += len(found.bad)
    if number > config.allow_bad:
        raise DatasetError(
            f"{number} images cannot be read: mend or remove them, or leave them out with "
            f"--config.data.allow_bad={number}"
        )


if __name__ == "__main__":
    cli.run(main)
