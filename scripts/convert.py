"""A network from PyTorch to Flax or back: `python scripts/convert.py SRC DST`.

SRC is a PyTorch file (.pt, .pth, .th, .safetensors) in any layout that `Layout` names, a run's
work directory, or one of its checkpoints, WORKDIR/checkpoints/STEP. DST's ending says what is
written: a PyTorch file, or without an ending a work directory, which scripts/evaluate.py and this
script read. Printed are every key with its shape and where it went, what was assumed where no key
tells, and how far the two networks' logits on the same random images are apart.

Not converted: the optimizer's state (a new work directory begins with momentum 0), and the
projections that tanjeffreyz's files hold but do not use (named in the table).
"""

import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from flax_resnet import cli
from flax_resnet.config import (
    ChannelPad,
    DataConfig,
    Experiment,
    Preprocess,
    ResNetConfig,
    Shortcut,
)
from flax_resnet.errors import ConfigError
from flax_resnet.json_files import write_json
from flax_resnet.optim import make_optimizer
from flax_resnet.step import Metrics, TrainState, init
from flax_resnet.training import workdir
from flax_resnet.training.checkpoint import Checkpoints, load_state
from flax_resnet.weights import files
from flax_resnet.weights.layouts import USUAL_PREPROCESS, Layout, StateDict, to_key, to_name
from flax_resnet.weights.state_dict import (
    COUNTER,
    UNUSED,
    Imported,
    flax_leaves,
    from_state_dict,
    to_state_dict,
)
from torch_ref.compare.agreement import NUM_IMAGES, logit_differences

LAYOUT = flags.DEFINE_enum_class("layout", Layout.TWIN, Layout, "keys of the PyTorch file to write")
SHORTCUT = flags.DEFINE_enum_class(
    "shortcut", None, Shortcut, "of a PyTorch SRC: no key tells plain from A"
)
CHANNEL_PAD = flags.DEFINE_enum_class(
    "channel_pad", None, ChannelPad, "of a PyTorch SRC with option A: no key tells"
)
DEPTH = flags.DEFINE_integer("depth", None, "what a PyTorch SRC must be")
PREPROCESS = flags.DEFINE_enum_class(
    "preprocess", None, Preprocess, "for a DST directory's config.json; default: the layout's usual"
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace DST if it is there")


def main(src: str, dst: str) -> None:
    source, target = Path(src), Path(dst)
    to_flax = is_directory_name(dst)
    check_target(source, target, to_flax)
    jax.config.update("jax_enable_x64", True)
    imported, state_dict = read_flax(source) if source.is_dir() else read_torch(source)
    config = imported.config
    if to_flax:
        compare(imported, state_dict, imported.layout)
        write_flax(target, imported)
    else:
        layout = LAYOUT.value
        state_dict = to_state_dict(
            config, imported.params, imported.batch_stats, step=imported.step, layout=layout
        )
        print_written(imported, state_dict, layout)
        compare(imported, state_dict, layout)
        files.write(target, state_dict, layout)
    print(f"written: {target}")


# --- Reading --------------------------------------------------------------------------------------


def read_torch(path: Path) -> tuple[Imported, StateDict]:
    contents = files.read(path)
    imported = from_state_dict(
        contents.state_dict,
        shortcut=SHORTCUT.value,
        channel_pad=CHANNEL_PAD.value,
        depth=DEPTH.value,
    )
    print(f"read: {path}, layout {imported.layout.value}, step {imported.step}")
    leaves = flax_leaves(imported.params) | flax_leaves(imported.batch_stats)
    print_table(
        (row.key, row.shape, *leaves.get(row.name, (row.name, ()))) for row in imported.rows
    )
    unused = [row.key for row in imported.rows if row.name == UNUSED] + contents.ignored
    print(f"unused: {', '.join(unused) or 'nothing'}")
    for choice in imported.choices:
        print(f"assumed: {choice}")
    print(f"network: {describe(imported.config)}")
    return imported, contents.state_dict


def read_flax(path: Path) -> tuple[Imported, StateDict]:
    if any(flag.present for flag in (SHORTCUT, CHANNEL_PAD, DEPTH)):
        raise ConfigError(f"{path} says itself what its network is: no --shortcut and the like")
    directory, step = workdir.locate(path)
    config = workdir.read_config(directory)
    config.validate()
    like = jax.eval_shape(lambda: init(config)[1])
    state = load_state(directory, like, step)
    print(f"read: {directory}, step {state.step}")
    print(f"network: {describe(config.model)}")
    params, batch_stats = jax.device_get((state.params, state.batch_stats))
    step = int(state.step)
    return Imported(config.model, params, batch_stats, step, Layout.TWIN, [], []), {}


def describe(config: ResNetConfig) -> str:
    """Such as "depth 20, shortcut A, ..."."""
    items = Experiment(model=config).to_dict()["model"].items()
    return ", ".join(f"{name} {value}" for name, value in items)


# --- Writing --------------------------------------------------------------------------------------


def is_directory_name(dst: str) -> bool:
    suffix = Path(dst).suffix
    if suffix in files.SUFFIXES:
        return False
    if suffix and not dst.endswith(os.sep):
        raise ConfigError(
            f"DST must end in one of {', '.join(files.SUFFIXES)}, or in no such ending or a "
            f"slash for a directory, got {dst}"
        )
    return True


def check_target(source: Path, target: Path, to_flax: bool) -> None:
    """Raises unless `target` can be written: before any work, and so that nothing is lost."""
    if to_flax and source.is_dir():
        raise ConfigError(f"{source} and {target} are both Flax's: nothing to convert")
    if not target.exists():
        return
    if not OVERWRITE.value:
        raise ConfigError(f"{target} is there already; --overwrite replaces it")
    if target.is_dir() != to_flax or (
        to_flax and not {p.name for p in target.iterdir()} <= {"config.json", "checkpoints"}
    ):
        raise ConfigError(f"{target} is nothing that convert.py wrote; remove it yourself")


def write_flax(target: Path, imported: Imported) -> None:
    """A work directory with one checkpoint, whole or not at all."""
    preprocess = PREPROCESS.value or USUAL_PREPROCESS[imported.layout]
    if not PREPROCESS.present:
        print(f"assumed: preprocess {preprocess.value} (no key tells; the layout's usual)")
    config = Experiment(model=imported.config, data=DataConfig(preprocess=preprocess))
    params, batch_stats = jax.tree.map(jnp.array, (imported.params, imported.batch_stats))
    optimizer = make_optimizer(config.optim).init(params)
    step = jnp.array(imported.step, jnp.int32)
    state = TrainState(step, params, batch_stats, optimizer, Metrics.zeros())

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_json(temporary / "config.json", config.to_dict())
        with Checkpoints(temporary / "checkpoints") as checkpoints:
            checkpoints.save(state, None)
        load_state(temporary, state)  # read back: its digest is that of what was saved
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def print_written(imported: Imported, state_dict: StateDict, layout: Layout) -> None:
    n = imported.config.blocks_per_stage
    leaves = flax_leaves(imported.params) | flax_leaves(imported.batch_stats)
    origins = {to_key(name, layout, n): leaf for name, leaf in leaves.items()}

    def origin(key: str) -> tuple[str, tuple[int, ...]]:
        return origins.get(key, (COUNTER if key.endswith("num_batches_tracked") else UNUSED, ()))

    print_table((*origin(key), key, array.shape) for key, array in state_dict.items())
    config = imported.config
    if (
        layout is Layout.AKAMASTER
        and config.shortcut is Shortcut.A
        and config.channel_pad is not ChannelPad.CENTRE
    ):
        print("note: akamaster's own code pads at the centre, this network at the end")


def print_table(rows) -> None:
    """Columns as wide as they need be, with an arrow in the middle."""
    cells = [[str(cell) if cell != () else "()" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        a, b, c, d = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(f"{a}  {b}  ->  {c}  {d}".rstrip())


# --- Comparing ------------------------------------------------------------------------------------


def compare(imported: Imported, state_dict: StateDict, layout: Layout) -> None:
    """Prints how far Flax's logits are from those of PyTorch with the PyTorch side's arrays.

    Raises:
        WeightsError: further than rounding explains.
    """
    named = {to_name(key, layout, state_dict): array for key, array in state_dict.items()}
    found = ", ".join(f"{dtype} {x:.1e}" for dtype, x in logit_differences(imported, named).items())
    print(f"largest difference of the logits, relative, on {NUM_IMAGES} random images: {found}")


if __name__ == "__main__":
    cli.run(main, "SRC", "DST")
