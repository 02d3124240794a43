"""The weights that `config.init` names for a new run to begin with: another run's, or a file's.

They are read once: the run's first checkpoint, of step 0, holds them.
"""

import contextlib
import dataclasses
import enum
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_resnet.config import (
    Architecture,
    DataConfig,
    Dataset,
    Experiment,
    Preprocess,
    ResNetConfig,
    Shortcut,
    written_out,
)
from flax_resnet.errors import ConfigError, WeightsError
from flax_resnet.nn import modules
from flax_resnet.nn.scan import Tree, stack, unstack
from flax_resnet.parallel.processes import from_first, on_first
from flax_resnet.parallel.sharding import put
from flax_resnet.places import place
from flax_resnet.resnet import split
from flax_resnet.settings import as_given
from flax_resnet.step import TrainState
from flax_resnet.training.mirror import fetch
from flax_resnet.training.workdir import locate, open_run, read_data_facts
from flax_resnet.weights import files, pretrained
from flax_resnet.weights.state_dict import Imported, from_state_dict

log = logging.getLogger(__name__)

UNTOLD = ("shortcut", "channel_pad", "stride")  # what the keys of a PyTorch file may not tell


class Weights(NamedTuple):
    """A network's arrays, on the host, block by block."""

    params: Tree
    batch_stats: Tree
    told: str  # whose they are


def with_weights_of(config: Experiment, state: TrainState) -> TrainState:
    """`state` with the parameters and BatchNorm's statistics that `config.init` names.

    But for the modules of `config.init_fresh`, which stay as they are. Of several processes only
    the first needs to have the weights.

    Raises:
        ConfigError: there are none of that name, or they are of another network or preprocessing;
            the message names what differs.
        WeightsError, CheckpointError: they are damaged, or hold no network of ours.
    """
    ours = state.params, state.batch_stats
    host: Any = jax.device_get(ours)

    def read() -> str:
        nonlocal host
        new = unstack(host)
        modules.check("init_fresh", config.init_fresh, new[0])
        weights = read_weights(config)
        theirs: Any = jax.tree_util.tree_map_with_path(
            lambda path, a, b: b if modules.is_within(path[1:], config.init_fresh) else a,
            weights[:2],
            new,
        )
        if jax.tree.structure(theirs) != jax.tree.structure(host):
            theirs = jax.device_get(stack(theirs))
        host = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), theirs, host)
        return weights.told

    log.info("begins with the weights of %s", on_first(read))
    params, batch_stats = jax.tree.map(
        lambda x, like: put(x, like.sharding), from_first(host), ours
    )
    return state._replace(params=params, batch_stats=batch_stats)


class Kind(enum.Enum):
    """Where weights come from."""

    RUN = enum.auto()  # a work directory, or one of its checkpoints
    PUBLISHED = enum.auto()  # a file with a card
    TORCH = enum.auto()  # any other file, or a folder of the Hub's


def find_weights(name: str) -> tuple[Kind, Path]:
    """What a name that `config.init` may be stands for. Raises as `with_weights_of` does."""
    path = fetch(place(name, "init", hub=True))
    if files.is_folder(path):
        return Kind.TORCH, path
    if locate(path)[0].is_dir():
        return Kind.RUN, path
    if path.suffix not in files.SUFFIXES and not path.is_file():
        return Kind.PUBLISHED, find(name)
    if not path.is_file():
        raise ConfigError(f"init: there is no file {path}")
    has_card = path.suffix == ".safetensors" and path.with_suffix(".json").exists()
    return (Kind.PUBLISHED if has_card else Kind.TORCH), path


def read_weights(config: Experiment) -> Weights:
    """What `config.init` names, if it fits `config`. Raises as `with_weights_of` does."""
    read = {Kind.RUN: of_run, Kind.PUBLISHED: of_published, Kind.TORCH: of_torch}
    with jax.enable_x64(True):  # they may be float64
        kind, path = find_weights(config.init or "")
        return read[kind](path, config)


def find(name: str) -> Path:
    """The file of published weights of that name."""
    try:
        return pretrained.find(name)
    except WeightsError as e:
        raise ConfigError(
            "init must be a work directory, one of its checkpoints (WORKDIR/checkpoints/STEP), a "
            f"file ({', '.join(files.SUFFIXES)}) or the name of published weights: {e}"
        ) from e


def of_run(path: Path, config: Experiment) -> Weights:
    run = open_run(path)
    told = f"{run.directory}, step {run.step}"
    check_architecture(
        told, run.config.model.architecture, config.model.architecture, config.init_fresh
    )
    # A work directory of convert.py knows nothing of data but what was assumed.
    is_certain = read_data_facts(run.directory) is not None
    check_preprocess(told, run.config.data, config, is_certain=is_certain)
    return Weights(run.state.params, run.state.batch_stats, told)


def of_published(path: Path, config: Experiment) -> Weights:
    card = pretrained.read_card(path)
    told = f"{path}"
    check_architecture(
        told, card.config.model.architecture, config.model.architecture, config.init_fresh
    )
    check_preprocess(told, card.config.data, config, is_certain=True)
    _, *arrays = split(pretrained.load_pretrained(path))
    params, batch_stats = jax.device_get(arrays)
    return Weights(params, batch_stats, told)


def of_torch(path: Path, config: Experiment) -> Weights:
    """Of a PyTorch file, whose keys do not tell everything: the rest is as `config` has it."""
    contents = files.read(path)
    state_dict, header = contents.state_dict, contents.header
    by_keys = imported = from_state_dict(state_dict, header=header)
    ours = config.model
    with contextlib.suppress(WeightsError):  # if the keys say otherwise, the next check tells
        imported = from_state_dict(
            state_dict,
            shortcut=ours.shortcut,
            channel_pad=ours.channel_pad,
            stride=ours.stride,
            projection=ours.projection,
            header=header,
        )
    theirs = imported.config.architecture
    untold = [name for name in UNTOLD if name in by_keys.assumed]
    if header is None and theirs.batch_norm_epsilon != ours.batch_norm_epsilon:
        theirs = dataclasses.replace(theirs, batch_norm_epsilon=ours.batch_norm_epsilon)
        untold.append("batch_norm_epsilon")
    check_architecture(f"{path}", theirs, ours.architecture, config.init_fresh)
    for name in untold:
        value = as_given(getattr(ours, name))
        log.warning("%s does not tell its %s: taken to be this run's, %s", path, name, value)
    is_certain = contents.preprocess is not None
    check_preprocess(f"{path}", images_of(contents, imported), config, is_certain=is_certain)
    return Weights(imported.params, imported.batch_stats, f"{path}, layout {imported.layout.value}")


def images_of(contents: files.Contents, imported: Imported) -> DataConfig:
    """What a file says of its images, or what such networks are usually fed."""
    preprocess = contents.preprocess or contents.likely_preprocess(imported)
    return DataConfig(**{"name": Dataset.FOLDER, **contents.images, "preprocess": preprocess})


# Settings of one module alone, which may differ where it begins afresh.
OF_MODULE = {"model.num_classes": "fc", "model.image_channels": "conv1"}


def check_architecture(
    source: str, theirs: Architecture, ours: Architecture, fresh: tuple[str, ...] = ()
) -> None:
    """Raises ConfigError unless the arrays of one network do in the other what they did.

    Args:
        fresh: modules of ours that take none.
    """
    a, b = settings(theirs), settings(ours)
    fresh = written_out(fresh)
    different = [
        name for name in a if name in b and a[name] != b[name] and OF_MODULE.get(name) not in fresh
    ]
    if not different:
        return
    told = ", ".join(f"{name}: {a[name]} there, {b[name]} here" for name in different)
    advice = "set --config.model to the same, or choose other weights"
    if all(name in OF_MODULE for name in different):
        names = ",".join(OF_MODULE[name] for name in different)
        advice += f", or begin with new ones there: --config.init_fresh={names}"
    raise ConfigError(f"init: {source} holds another network ({told}); {advice}")


def settings(architecture: Architecture) -> dict[str, Any]:
    """An architecture by the settings that make it, but for those that its network lacks."""
    config = ResNetConfig.of(architecture)
    found: dict[str, Any] = {"depth": config.depth, "stages": config.stages}
    # Every field, so that none that is new is forgotten; depth and stages stand for three.
    for field in dataclasses.fields(Architecture):
        if field.name not in ("block", "widths", "blocks"):
            found[field.name] = getattr(architecture, field.name)
    if architecture.shortcut is not Shortcut.A:
        del found["channel_pad"]
    if architecture.shortcut not in (Shortcut.B, Shortcut.C):
        del found["projection"]
    return {f"model.{name}": as_given(value) for name, value in found.items()}


def check_preprocess(
    source: str, theirs: DataConfig, config: Experiment, *, is_certain: bool
) -> None:
    """Raises ConfigError if the weights know another preprocessing; warns if they may."""
    ours, names = config.data, ["preprocess"]
    if theirs.preprocess is Preprocess.CONSTANTS:
        names += ["mean", "std"]
    different = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
    if not different:
        return
    if is_certain:

        def text(data: DataConfig, name: str) -> str:
            value = as_given(getattr(data, name))
            return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

        told = "; ".join(
            f"data.{name} {text(theirs, name)}, this run's is {text(ours, name) or 'none'}"
            for name in different
        )
        flags = " ".join(f"--config.data.{name}={text(theirs, name)}" for name in different)
        raise ConfigError(f"init: {source} knows images by {told}; set {flags}")
    log.warning(
        "%s does not tell data.preprocess: usual is %s, this run's is %s",
        source,
        theirs.preprocess.value,
        ours.preprocess.value,
    )
