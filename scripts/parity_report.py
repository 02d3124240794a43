"""Where do two networks part? `python scripts/parity_report.py --config.model.depth=56 --out DIR`.

Runs a Flax network and its PyTorch twin on the same random batch, forward and backward in training
mode, and draws block by block how far they are apart: the relative difference (L2) of each block's
output, and of the loss's gradient with respect to it, in float64, float32 and bfloat16.

Ours has random weights, or those of --checkpoint (a run, or a PyTorch file of a known layout).
Theirs has the same, or those of --state_dict: so a port shows where it departs. In float64 two
right networks differ by rounding alone; the first block that differs by more is named, and the
weights that differ. Exit code 1 if there is one. Writes DIR/parity.png and DIR/parity.html.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags

from flax_resnet import cli
from flax_resnet.config import ChannelPad, Experiment, Shortcut
from flax_resnet.errors import ConfigError
from flax_resnet.step import init
from flax_resnet.training.mirror import fetch
from flax_resnet.training.workdir import is_run, open_run
from flax_resnet.weights import files
from flax_resnet.weights.state_dict import from_state_dict
from torch_ref.compare.trace import Weights, compare
from torch_ref.compare.trace_report import write_report

CHECKPOINT = cli.define_place("checkpoint", None, "our weights: a run or a PyTorch file")
STATE_DICT = cli.define_place("state_dict", None, "their weights, a PyTorch file")
SHORTCUT = flags.DEFINE_enum_class(
    "shortcut", None, Shortcut, "of a file whose keys do not show it"
)
CHANNEL_PAD = flags.DEFINE_enum_class("channel_pad", None, ChannelPad, "likewise, for option A")
OUT = cli.define_path("out", "parity_report", "folder of the picture and the page")
IMAGES = flags.DEFINE_integer("images", 8, "random images in the batch", lower_bound=2)
cli.define_overrides(
    "Those of the model hold where no --checkpoint is given.",
    ("model", "seed"),
    but=("model.dtype", "model.remat", "model.scan_blocks"),  # all types, block by block
)


def main() -> None:
    config = cli.override(Experiment())
    cli.check_effects([config])
    check_flags()
    jax.config.update("jax_enable_x64", True)
    ours = load(fetch(CHECKPOINT.value)) if CHECKPOINT.value else random_weights(config)
    theirs = load(fetch(STATE_DICT.value)) if STATE_DICT.value else ours
    rng = np.random.default_rng(config.seed)
    image = rng.normal(size=(IMAGES.value, 32, 32, 3))
    label = rng.integers(ours.config.num_classes, size=IMAGES.value)
    comparison = compare(ours, theirs, image, label)
    picture, page = write_report(comparison, ours.config, OUT.value)
    print("\n".join(comparison.verdict))
    print(f"{picture} and {page} written")
    sys.exit(len(comparison.verdict) > 1)


def check_flags() -> None:
    """Raises ConfigError for a flag that would change nothing."""
    of_model = [path for path in cli.overrides() if path.startswith("model.")]
    if CHECKPOINT.value and of_model:
        raise ConfigError(f"--config.{of_model[0]} would change nothing: --checkpoint says it")
    files = [x for x in (CHECKPOINT.value, STATE_DICT.value) if x and not Path(x).is_dir()]
    for flag in (SHORTCUT, CHANNEL_PAD):
        if flag.present and not files:
            raise ConfigError(f"--{flag.name} would change nothing: it is of a PyTorch file")


def random_weights(config: Experiment) -> Weights:
    config.model = config.model.block_by_block()
    _, state = init(config)
    return Weights(config.model, state.params, state.batch_stats)


def load(path: Path) -> Weights:
    """The network of a run, of `RUN/checkpoints/STEP` (or `best`), or of a PyTorch file."""
    if is_run(path):
        run = open_run(path)
        return Weights(run.config.model, run.state.params, run.state.batch_stats)
    imported = from_state_dict(
        files.read(path).state_dict, shortcut=SHORTCUT.value, channel_pad=CHANNEL_PAD.value
    )
    for assumption in imported.assumed.values():
        print(f"{path}: assumed: {assumption}")
    return Weights(imported.config, imported.params, imported.batch_stats)


if __name__ == "__main__":
    cli.run(main)
