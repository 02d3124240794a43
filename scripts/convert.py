"""A network from PyTorch to Flax or back: `python scripts/convert.py SRC DST`.

SRC is a PyTorch file (of torch.save, or safetensors) in any layout that `Layout` names, a run's
work directory, or one of its checkpoints, WORKDIR/checkpoints/STEP or WORKDIR/checkpoints/best.
DST's ending says what is written: a PyTorch file, or without an ending a work directory, which
scripts/evaluate.py and this script read; with --layout=huggingface it is a folder of transformers.
SRC may be such a folder, too. Printed are every key with its shape and where it went, what the file
does not tell and was assumed, and how far the two networks' logits on the same random images are
apart.

Where the images of --config.data.name are on this machine, BatchNorm's statistics tell what the
keys do not: see scripts/identify.py.

Not converted: the optimizer's state (a new work directory begins with momentum 0), and the
projections that tanjeffreyz's files hold but do not use (named in the table).
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from flax_resnet import cli, places
from flax_resnet.config import ChannelPad, DataConfig, Preprocess, Shortcut, Stride
from flax_resnet.data import source
from flax_resnet.data.pixels import Normalization
from flax_resnet.errors import ConfigError
from flax_resnet.training.converted import check_target, is_workdir_name, write_workdir
from flax_resnet.training.identified import settle
from flax_resnet.training.mirror import fetch
from flax_resnet.training.workdir import is_run, open_run, read_data_facts
from flax_resnet.weights import account, files
from flax_resnet.weights.header import Header
from flax_resnet.weights.layouts import Layout, StateDict, by_name, prefix_to_write
from flax_resnet.weights.state_dict import Imported, from_state_dict, to_state_dict
from torch_ref.compare.agreement import NUM_IMAGES, logit_differences

LAYOUT = flags.DEFINE_enum_class("layout", Layout.TWIN, Layout, "keys of the PyTorch file to write")
PREFIX = flags.DEFINE_string(
    "prefix",
    None,
    "what stands before every key that is written, such as module.; default: module. in "
    "akamaster's layout, nothing in all others",
)
SHORTCUT = flags.DEFINE_enum_class(
    "shortcut", None, Shortcut, "of a PyTorch SRC: plain networks and shortcut A have the same keys"
)
CHANNEL_PAD = flags.DEFINE_enum_class(
    "channel_pad",
    None,
    ChannelPad,
    "of a PyTorch SRC with shortcut A: its keys do not show where it pads",
)
STRIDE = flags.DEFINE_enum_class(
    "stride",
    None,
    Stride,
    "of a PyTorch SRC with bottlenecks: its keys do not show which convolution halves the image",
)
EPSILON = flags.DEFINE_float(
    "batch_norm_epsilon",
    None,
    "of a PyTorch SRC: its keys do not show it; default: PyTorch's, 1e-5",
)
DEPTH = flags.DEFINE_integer("depth", None, "what a PyTorch SRC must be")
PREPROCESS = flags.DEFINE_enum_class(
    "preprocess",
    None,
    Preprocess,
    "of a PyTorch SRC, for a DST that is a directory or .safetensors; default: the layout's usual",
)
ENTRY = flags.DEFINE_string(
    "entry", None, "of a PyTorch SRC with several state dicts: its name, such as state_dict_ema"
)
RENAME = flags.DEFINE_multi_string(
    "rename", [], "of a PyTorch SRC with other keys: 'OLD=NEW', a regular expression; repeatable"
)
IGNORE = flags.DEFINE_multi_string(
    "ignore", [], "of a PyTorch SRC with keys too many: a regular expression; repeatable"
)
cli.define_overrides(
    "Whose images tell what the keys of a PyTorch SRC do not; the defaults are:",
    ("data.name", "data.dir"),
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace DST if it is there")


def main(src: str, dst: str) -> None:
    target, to_folder = places.local_path(dst, "DST"), is_workdir_name(dst)
    to_flax = to_folder and LAYOUT.value is not Layout.HUGGINGFACE
    origin = fetch(places.place(src, "SRC", hub=True))
    from_flax = is_run(origin)
    if to_flax and from_flax:
        raise ConfigError(f"{origin} and {target} are both Flax's: nothing to convert")
    for flag in (LAYOUT, PREFIX) if to_flax else ():
        if flag.present:
            raise ConfigError(f"--{flag.name} would change nothing: DST is a work directory")
    if PREPROCESS.present and not to_folder and target.suffix != ".safetensors":
        raise ConfigError("--preprocess would change nothing: DST has no place for it")
    prefix = prefix_to_write(LAYOUT.value, PREFIX.value)
    if to_folder and prefix:
        raise ConfigError("--prefix would make a folder that transformers does not read")
    check_target(target, is_workdir=to_folder, overwrite=OVERWRITE.value)
    jax.config.update("jax_enable_x64", True)
    read = read_flax(origin) if from_flax else read_torch(origin)
    imported, named, layout, state_dict = read.imported, read.named, LAYOUT.value, {}
    if not to_flax:
        state_dict = to_state_dict(
            imported.config.architecture,
            imported.params,
            imported.batch_stats,
            step=imported.step,
            layout=layout,
            prefix="",
        )
        print(account.of_writing(imported, state_dict, layout, prefix))
        named = {name: state_dict[key] for name, key in by_name(state_dict, layout).items()}
    differences = logit_differences(imported, named)
    found = ", ".join(f"{dtype} {x:.1e}" for dtype, x in differences.items())
    print(f"largest difference of the logits, relative, on {NUM_IMAGES} random images: {found}")
    if to_flax or target.suffix == ".safetensors":
        tell_preprocess(read)
    if to_flax:
        images = {**read.images, "preprocess": read.preprocess}
        write_workdir(target, imported, DataConfig(**images))
    else:
        header = Header(
            imported.config.architecture,
            read.preprocess,
            read.normalization,
            imported.config.batch_norm_momentum,
            imported.assumed,
            assumes_preprocess=read.assumes_preprocess,
        )
        state_dict = {prefix + key: array for key, array in state_dict.items()}
        if to_folder:
            files.write_folder(target, state_dict, header)
        else:
            files.write(target, state_dict, layout, header)
    print(f"written: {target}")


class Read(NamedTuple):
    """What SRC holds."""

    imported: Imported
    named: StateDict  # by the twin's names, as PyTorch has them; of a PyTorch file
    preprocess: Preprocess
    normalization: Normalization | None
    assumes_preprocess: bool = False
    images: Mapping[str, Any] = {}  # settings of `DataConfig`, by name


def read_torch(path: Path) -> Read:
    contents = files.read(path, ENTRY.value)
    read = functools.partial(
        from_state_dict,
        contents.state_dict,
        batch_norm_epsilon=EPSILON.value,
        depth=DEPTH.value,
        header=contents.header,
        rename=RENAME.value,
        ignore=IGNORE.value,
    )
    given: dict[str, Any] = {
        "shortcut": SHORTCUT.value,
        "channel_pad": CHANNEL_PAD.value,
        "stride": STRIDE.value,
        "epsilon": EPSILON.value,
        "preprocess": PREPROCESS.value,
    }
    imported, found, lines = settle(read, given, contents.preprocess, images_at_hand())
    if CHANNEL_PAD.present and imported.config.shortcut is not Shortcut.A:
        raise ConfigError("--channel_pad would change nothing: only shortcut A pads channels")
    print(f"read: {path}, layout {imported.layout.value}, step {imported.step}")
    print(account.of_reading(imported, contents.ignored, contents.told))
    for line in lines:
        print(line)
    named = {name: contents.state_dict[key] for key, name, _ in imported.placements}
    told = contents.preprocess
    if PREPROCESS.present and told is not None and told is not PREPROCESS.value:
        raise ConfigError(
            f"--preprocess must be {told.value}, as the header of {path} says, got "
            f"{PREPROCESS.value.value}"
        )
    told = told or found
    usual = contents.likely_preprocess(imported)
    return Read(
        *(imported, named, told or usual, contents.normalization),
        assumes_preprocess=told is None,
        images=contents.images,
    )


def images_at_hand() -> DataConfig | None:
    """The data set whose images are looked at, if it is on this machine."""
    told = cli.overrides()
    data = DataConfig(name=told.get("data.name", DataConfig.name), dir=told.get("data.dir"))
    if source.is_here(data):
        return data
    if told:
        raise ConfigError(f"there is no {data.name.value} in {data.dir or 'the default directory'}")
    return None


def read_flax(path: Path) -> Read:
    own = (SHORTCUT, CHANNEL_PAD, STRIDE, EPSILON, DEPTH, PREPROCESS, ENTRY, RENAME, IGNORE)
    if any(flag.present for flag in own) or cli.overrides():
        raise ConfigError(f"{path} says itself what its network is: no --shortcut and the like")
    run = open_run(path)
    print(f"read: {run.directory}, step {run.step}")
    print(f"network: {account.describe(run.config.model)}")
    weights = run.state.params, run.state.batch_stats
    imported = Imported(run.config.model, *weights, run.step, Layout.TWIN, [], {})
    facts = read_data_facts(run.directory)
    return Read(imported, {}, run.config.data.preprocess, facts and facts.normalization)


def tell_preprocess(read: Read) -> None:
    if read.assumes_preprocess:
        print(
            f"assumed: preprocess {read.preprocess.value}, as is usual for such networks in the "
            "layout that they came in. The file does not tell; set preprocess if it is another"
        )


if __name__ == "__main__":
    cli.run(main, "SRC", "DST")
