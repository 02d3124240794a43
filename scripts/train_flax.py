"""Trains a network: `python scripts/train_flax.py --config configs/resnet20.py [--workdir DIR]`.

Any setting can be overridden: `--config.model.shortcut=B --config.train.steps=200`. Run again, it
goes on from the newest checkpoint in the work directory. DIR may be gs://BUCKET/NAME or
s3://BUCKET/NAME: then the run trains in a local copy, and what is new goes there.

Several processes train as one: on a TPU VM, under Slurm and under Open MPI without being told,
elsewhere with `--coordinator HOST:PORT --num_processes N --process_id I`; only process 0 has a work
directory.
"""

from pathlib import Path

from absl import flags

from flax_resnet import cli
from flax_resnet.errors import ConfigError
from flax_resnet.parallel import processes
from flax_resnet.training.loop import fit
from flax_resnet.training.mirror import mirrored

CONFIG = cli.define_config(default="quickstart")
WORKDIR = cli.define_place(
    "workdir",
    None,
    "where the run lives, a directory or the URL of a bucket; default: runs/<config's name>",
)
LOCAL = cli.define_path(
    "local",
    None,
    "of a run in a bucket: where its local copy lies; default: in ~/.cache/flax-resnet/runs",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where all meet")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes train together")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "which one this is, from 0")


def main() -> None:
    config = cli.experiment(CONFIG)
    processes.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    place = WORKDIR.value or Path(f"runs/{cli.config_name(CONFIG)}")
    if LOCAL.value and isinstance(place, Path):
        raise ConfigError(f"--local is of a --workdir in a bucket, which {place} is not")
    with mirrored(place, LOCAL.value) as workdir:
        fit(config, workdir)


if __name__ == "__main__":
    cli.run(main)
