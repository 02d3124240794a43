"""A network from PyTorch to Flax or back: `python scripts/convert.py SRC DST`.

SRC is a PyTorch file (.pt, .pth, .th, .safetensors) in any layout that `Layout` names, a run's
work directory, or one of its checkpoints, WORKDIR/checkpoints/STEP or WORKDIR/checkpoints/best.
DST's ending says what is written: a PyTorch file, or without an ending a work directory, which
scripts/evaluate.py and this script read. Printed are every key with its shape and where it went,
what the file does not tell and was assumed, and how far the two networks' logits on the same random
images are apart.

Not converted: the optimizer's state (a new work directory begins with momentum 0), and the
projections that tanjeffreyz's files hold but do not use (named in the table).
"""

from pathlib import Path

import jax
from absl import flags

from flax_resnet import cli, places
from flax_resnet.config import ChannelPad, Preprocess, Shortcut, Stride
from flax_resnet.errors import ConfigError
from flax_resnet.training.converted import check_target, is_workdir_name, write_workdir
from flax_resnet.training.mirror import fetch
from flax_resnet.training.workdir import is_run, open_run
from flax_resnet.weights import account, files
from flax_resnet.weights.infer import usual_preprocess
from flax_resnet.weights.layouts import Layout, StateDict, prefix_to_write
from flax_resnet.weights.state_dict import Imported, from_state_dict, to_state_dict
from torch_ref.compare.agreement import NUM_IMAGES, logit_differences

LAYOUT = flags.DEFINE_enum_class("layout", Layout.TWIN, Layout, "keys of the PyTorch file to write")
PREFIX = flags.DEFINE_string(
    "prefix",
    None,
    "what stands before every key of the PyTorch file to write, such as module.; default: module. "
    "in akamaster's layout, nothing in all others",
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
DEPTH = flags.DEFINE_integer("depth", None, "what a PyTorch SRC must be")
PREPROCESS = flags.DEFINE_enum_class(
    "preprocess", None, Preprocess, "for a DST directory's config.json; default: the layout's usual"
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace DST if it is there")


def main(src: str, dst: str) -> None:
    target, to_flax = places.local_path(dst, "DST"), is_workdir_name(dst)
    source = fetch(places.place(src, "SRC"))
    from_flax = is_run(source)
    if to_flax and from_flax:
        raise ConfigError(f"{source} and {target} are both Flax's: nothing to convert")
    for flag in (LAYOUT, PREFIX) if to_flax else (PREPROCESS,):
        if flag.present:
            raise ConfigError(f"--{flag.name} would change nothing: DST is {kind_of(to_flax)}")
    prefix = prefix_to_write(LAYOUT.value, PREFIX.value)
    check_target(target, is_workdir=to_flax, overwrite=OVERWRITE.value)
    jax.config.update("jax_enable_x64", True)
    imported, state_dict = read_flax(source) if from_flax else read_torch(source)
    layout = imported.layout if to_flax else LAYOUT.value
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
    differences = logit_differences(imported, state_dict, layout)
    found = ", ".join(f"{dtype} {x:.1e}" for dtype, x in differences.items())
    print(f"largest difference of the logits, relative, on {NUM_IMAGES} random images: {found}")
    if to_flax:
        write_workdir(target, imported, choose_preprocess(imported))
    else:
        files.write(target, {prefix + key: x for key, x in state_dict.items()}, layout)
    print(f"written: {target}")


def kind_of(is_flax: bool) -> str:
    return "a work directory" if is_flax else "a PyTorch file"


def read_torch(path: Path) -> tuple[Imported, StateDict]:
    contents = files.read(path)
    imported = from_state_dict(
        contents.state_dict,
        shortcut=SHORTCUT.value,
        channel_pad=CHANNEL_PAD.value,
        stride=STRIDE.value,
        depth=DEPTH.value,
    )
    if CHANNEL_PAD.present and imported.config.shortcut is not Shortcut.A:
        raise ConfigError("--channel_pad would change nothing: only shortcut A pads channels")
    print(f"read: {path}, layout {imported.layout.value}, step {imported.step}")
    print(account.of_reading(imported, contents.ignored))
    return imported, contents.state_dict


def read_flax(path: Path) -> tuple[Imported, StateDict]:
    if any(flag.present for flag in (SHORTCUT, CHANNEL_PAD, STRIDE, DEPTH)):
        raise ConfigError(f"{path} says itself what its network is: no --shortcut and the like")
    run = open_run(path)
    print(f"read: {run.directory}, step {run.step}")
    print(f"network: {account.describe(run.config.model)}")
    weights = run.state.params, run.state.batch_stats
    return Imported(run.config.model, *weights, run.step, Layout.TWIN, [], {}), {}


def choose_preprocess(imported: Imported) -> Preprocess:
    if PREPROCESS.present:
        return PREPROCESS.value
    usual = usual_preprocess(imported.config.architecture, imported.layout)
    print(
        f"assumed: preprocess {usual.value}, as is usual for such networks in the "
        f"{imported.layout.value} layout. The file does not tell; set preprocess if it is another"
    )
    return usual


if __name__ == "__main__":
    cli.run(main, "SRC", "DST")
