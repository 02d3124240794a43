"""What no key of a checkpoint tells, by its statistics: `python scripts/identify.py FILE`.

FILE is a PyTorch file or whatever else scripts/convert.py reads, a run's work directory, or one of
its checkpoints. BatchNorm's running statistics are what the right network saw of the right numbers.
So every reading that its keys allow (shortcut, channel_pad, stride, preprocessing, order of the
colours, epsilon) is tried on some training images of --config.data.name, the data that FILE was
trained on, and printed with its divergence: how far what it sees is from what FILE remembers.

The last line printed is JSON: {"shortcut", "channel_pad", "stride", "preprocess", "colours",
"epsilon", "divergence", "second": the next reading's, "unsure": fields that are not settled,
"verdict": clear, thin (something is not settled), bad (no reading fits: other images, or damaged
statistics) or nothing (no step was trained, or the network takes no colour images)}. What a network
does not have is null.
"""

import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
from absl import flags

from flax_resnet import cli, places
from flax_resnet.config import Architecture, DataConfig, Dataset, Preprocess
from flax_resnet.errors import ConfigError
from flax_resnet.settings import as_given
from flax_resnet.training.identified import compared, conclusion, material, preprocessings
from flax_resnet.training.mirror import fetch
from flax_resnet.training.workdir import is_run, open_run
from flax_resnet.weights import files
from flax_resnet.weights.identify import NETWORK, NOTHING, NUM_IMAGES, Read, identify
from flax_resnet.weights.state_dict import from_state_dict, to_state_dict

IMAGES = flags.DEFINE_integer("images", NUM_IMAGES, "how many to try the readings on", 2, 10_000)
MEAN = flags.DEFINE_multi_string(
    "mean", None, "r,g,b of one more preprocessing, of pixels in 0..1, or (above 1) in 0..255"
)
STD = flags.DEFINE_multi_string("std", None, "r,g,b that goes with --mean; both can be repeated")
ENTRY = flags.DEFINE_string("entry", None, "of several state dicts in FILE, as in convert.py")
RENAME = flags.DEFINE_multi_string("rename", [], "of keys of FILE: 'OLD=NEW', as in convert.py")
IGNORE = flags.DEFINE_multi_string("ignore", [], "keys of FILE, as in convert.py")
cli.define_overrides(
    "The run's own hold where none is given, and else the defaults:", ("data.name", "data.dir")
)


def main(source: str) -> None:
    more = preprocessings(MEAN.value or [], STD.value or [])
    jax.config.update("jax_enable_x64", True)  # it may hold float64
    path = fetch(places.place(source, "FILE", hub=True))
    read, data, claimed = read_run(path) if is_run(path) else read_torch(path)
    told = cli.overrides()
    data.name, data.dir = told.get("data.name", data.name), told.get("data.dir", data.dir)
    if data.name is Dataset.DIGITS and "data.dir" in told:
        raise ConfigError(
            "--config.data.dir would change nothing: the digits come with scikit-learn"
        )
    images = material(data, IMAGES.value)
    found = identify(read, images.image, images.constants | more)
    if found is None:
        print("its statistics tell nothing: no step was trained, or it takes no colour images")
        print(json.dumps(NOTHING))
        return
    print(f"divergence of each reading on {len(images.image)} images of {images.name}:")
    for reading, divergence in found.divergences.items():
        values = {**reading._asdict(), "crop": reading.crop}
        told_of = (f"{k} {as_given(v)}" for k, v in values.items() if v is not None)
        print(f"  {divergence:10.5f}  {', '.join(told_of)}")
    print(conclusion(found))
    if claimed is not None:
        print(compared(claimed, found))
    print(json.dumps(found.to_dict()))


def read_torch(path: Path) -> tuple[Read, DataConfig, dict[str, Any] | None]:
    contents = files.read(path, ENTRY.value)
    own: dict[str, Any] = {"rename": RENAME.value, "ignore": IGNORE.value}
    header, claimed = contents.header, None
    if header is not None:
        own |= settings_of(header.architecture)
        claimed = claims(header.architecture, header.preprocess, but=header.assumed)
    read = functools.partial(from_state_dict, contents.state_dict, **own)
    print(f"read: {path}, layout {read().layout.value}")
    return read, DataConfig(), claimed


def read_run(path: Path) -> tuple[Read, DataConfig, dict[str, Any]]:
    """A run whose config.json is not believed, and what it says."""
    for flag in (ENTRY, RENAME, IGNORE):
        if flag.present:
            raise ConfigError(f"--{flag.name} would change nothing: {path} is no PyTorch file")
    run = open_run(path)
    architecture, data = run.config.model.architecture, run.config.data
    state = to_state_dict(architecture, run.state.params, run.state.batch_stats, step=run.step)
    print(f"read: {run.directory}, step {run.step}")
    read = functools.partial(from_state_dict, state, **settings_of(architecture))
    return read, data, claims(architecture, data.preprocess)


def settings_of(architecture: Architecture) -> dict[str, Any]:
    """What is believed of a checkpoint that tells its architecture: what cannot be identified."""
    return {
        "projection": architecture.projection,
        "batch_norm_epsilon": architecture.batch_norm_epsilon,
    }


def claims(
    architecture: Architecture, preprocess: Preprocess | None, but: Collection[str] = ()
) -> dict[str, Any]:
    """What a checkpoint says of itself, without what it only assumes."""
    found = {name: getattr(architecture, name) for name in NETWORK if name not in but}
    return found | ({"preprocess": preprocess.value} if preprocess else {})


if __name__ == "__main__":
    cli.run(main, "FILE")
