"""Trains a network: `python scripts/train_flax.py --config configs/resnet20.py [--workdir DIR]`.

Any setting can be overridden: `--config.model.shortcut=B --config.train.steps=200`. Run again, it
goes on from the newest checkpoint in the work directory.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from flax_resnet import cli
from flax_resnet.loop import fit

CONFIG = cli.define_config(default="configs/quickstart.py")
WORKDIR = flags.DEFINE_string("workdir", None, "where the run lives; default: runs/<config's name>")


def main() -> None:
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    fit(cli.experiment(CONFIG), Path(WORKDIR.value or f"runs/{name}"))


if __name__ == "__main__":
    cli.run(main)
