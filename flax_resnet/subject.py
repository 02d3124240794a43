"""The network that a command is given as --checkpoint, ready to be shown images.

It comes from a run, a PyTorch file or folder, or the Hub. What such a thing says of the images it
wants (how they are cut, how pixels become numbers, what its classes are called) comes with it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from flax_resnet import cli
from flax_resnet.config import DataConfig, Experiment, Preprocess
from flax_resnet.data import source
from flax_resnet.data.pixels import FROM_TRAINING_IMAGES, Normalization
from flax_resnet.data_config import SIDE
from flax_resnet.errors import ConfigError, WeightsError
from flax_resnet.nn.scan import Tree, stack
from flax_resnet.resnet import param_dtype
from flax_resnet.step import TrainState
from flax_resnet.training.identified import settle
from flax_resnet.training.workdir import is_run, open_run, read_config, read_data_facts
from flax_resnet.weights import account, files, pretrained
from flax_resnet.weights.pretrained import Card
from flax_resnet.weights.state_dict import Imported, from_state_dict

OF_NETWORKS = ("shortcut", "channel_pad", "stride")  # settings that keys do not always tell
OF_CARDS = ("interpolation", "mean", "std")  # settings of images that they tell

Check = Callable[[Experiment], None]
Prepare = Callable[[Experiment, bool], Experiment]
Tell = Callable[[str], None]

flags.disclaim_key_flags()  # those of `define_flags` belong to the script that asks for them


class Subject(NamedTuple):
    """What is to be shown images."""

    config: Experiment
    params: Tree
    batch_stats: Tree
    normalization: Normalization
    title: str
    classes: tuple[str, ...] | None  # their names, where it says them itself


class Flags(NamedTuple):
    """How --checkpoint is to be read."""

    entry: flags.FlagHolder
    rename: flags.FlagHolder
    ignore: flags.FlagHolder
    preprocess: flags.FlagHolder


def define_flags() -> Flags:
    """Those of a script that takes --checkpoint."""
    of = "of weights from PyTorch"
    return Flags(
        flags.DEFINE_string(
            "entry", None, f"{of}, with several state dicts: its name, such as state_dict_ema"
        ),
        flags.DEFINE_multi_string(
            "rename", [], f"{of} with other keys: 'OLD=NEW', a regular expression; repeatable"
        ),
        flags.DEFINE_multi_string(
            "ignore", [], f"{of} with keys too many: a regular expression; repeatable"
        ),
        flags.DEFINE_enum_class("preprocess", None, Preprocess, "how pixels become numbers"),
    )


def read(
    path: Path,
    told: Flags,
    check: Check,
    images: DataConfig | None,
    prepare: Prepare,
    tell: Tell = print,
) -> Subject:
    """The network at a local path, with the settings of the command line.

    Args:
        check: raises a UserError for a network, or images, that the command cannot use.
        prepare: makes the defaults of the command out of what the path says, and whether that is a
            run.
        tell: is given what is to be said of a PyTorch file.
        images: the data set whose training images may tell what a PyTorch file does not; None:
            none are looked at.

    Raises:
        UserError: it cannot be read, or a flag or setting does not fit it or would change nothing.
    """
    if is_run(path):
        return _read_run(path, told, check, prepare)
    return _read_torch(path, told, check, images, prepare, tell)


def _read_run(path: Path, told: Flags, check: Check, prepare: Prepare) -> Subject:
    for flag in told[:3]:
        if flag.present:
            raise ConfigError(f"--{flag.name} would change nothing: {path} is no PyTorch file")
    run = open_run(path)
    config = _with_preprocess(cli.override(prepare(read_config(run.directory), True)), told)
    if config.model.architecture != run.config.model.architecture:
        raise ConfigError(
            f"{run.directory} says itself what its network is; --config.model takes dtype, "
            "scan_blocks and remat of a run, nothing else"
        )
    kept = read_data_facts(run.directory)
    check(config)
    # Also where a run kept nothing, such as a converted one: of the data that the flags name.
    is_kept = kept is not None and config.data.preprocess is run.config.data.preprocess
    _check_flags(config, told, uses_training_images=not is_kept)
    constants = kept.normalization if kept and is_kept else _constants(config.data)
    title = f"{run.directory}, step {run.step}"
    data = run.config.data
    classes = kept and kept.classes
    if classes is None and source.is_small(data):
        classes = source.class_names(data)
    return Subject(config, *_arrays(config, run.state), constants, title, classes)


def _read_torch(
    path: Path,
    told: Flags,
    check: Check,
    images: DataConfig | None,
    prepare: Prepare,
    tell: Tell,
) -> Subject:
    contents, card = files.read(path, told.entry.value), _card(path)
    given, header = cli.overrides(), contents.header
    epsilon = given.get("model.batch_norm_epsilon")
    read = functools.partial(
        from_state_dict,
        contents.state_dict,
        batch_norm_epsilon=epsilon,
        depth=given.get("model.depth"),
        header=header,
        rename=told.rename.value,
        ignore=told.ignore.value,
    )
    model = card and card.config.model
    known = {x: given.get(f"model.{x}") or getattr(model, x, None) for x in OF_NETWORKS}
    known |= {"epsilon": epsilon, "preprocess": told.preprocess.value}
    known["preprocess"] = known["preprocess"] or given.get("data.preprocess")
    own_preprocess = card.config.data.preprocess if card else contents.preprocess
    if preprocess := known["preprocess"] or own_preprocess:
        _check_validation(preprocess, card is None and contents.normalization is None)
    # Our own header is believed against the user; of a card or Hugging Face's file he may differ.
    is_default = card is not None or bool(contents.images)
    certain = None if is_default and known["preprocess"] else own_preprocess
    imported, found, lines = settle(read, known, certain, images)
    for line in [*account.unwrapping(imported, contents.told), *lines]:
        tell(line)
    for assumption in imported.assumed.values():
        tell(f"assumed: {assumption}")
    preprocess = own_preprocess or found or contents.likely_preprocess(imported)
    own = {**contents.images, "preprocess": preprocess}
    if card is not None:
        own |= {name: getattr(card.config.data, name) for name in OF_CARDS}
        own["resize"], own["crop"], _ = card.config.data.view
    usual = Experiment(model=dataclasses.replace(imported.config), data=DataConfig(**own))
    config = _with_preprocess(cli.override(prepare(usual, False)), told)
    if config.model.architecture != imported.config.architecture:
        raise ConfigError(
            f"{path} tells itself what its network is; --config.model takes the shortcut, "
            "channel_pad, stride, batch_norm_epsilon, depth, dtype, scan_blocks and remat of a "
            "PyTorch file, nothing else"
        )
    check(config)
    if own_preprocess and not is_default and config.data.preprocess is not preprocess:
        raise ConfigError(
            f"data.preprocess must be {preprocess.value}, as the header of {path} says, got "
            f"{config.data.preprocess.value}"
        )
    constants = None if contents.images else contents.normalization
    if card is not None:
        is_its_own = config.data.preprocess is own_preprocess
        constants = card.normalization if is_its_own else None
    _check_flags(config, told, uses_training_images=constants is None)
    constants = constants or _constants(config.data)
    title = f"{path}, layout {imported.layout.value}"
    classes = contents.classes or (card and _classes_of(card))
    return Subject(config, *_arrays(config, imported), constants, title, classes)


def _card(path: Path) -> Card | None:
    """That of published weights; None: they are none."""
    with contextlib.suppress(WeightsError):
        return pretrained.read_card(path) if path.suffix == ".safetensors" else None


def _classes_of(card: Card) -> tuple[str, ...] | None:
    told = card.tree.get("classes")
    if told is None and source.is_small(card.config.data):
        return source.class_names(card.config.data)
    return told and tuple(map(str, told))


def _constants(data: DataConfig) -> Normalization:
    """Of the preprocessing; taken from training images of 32 pixels, of these as they are."""
    if source.is_small(data) and data.view[:2] == (SIDE, SIDE):
        data = dataclasses.replace(data, resize=None, crop=None)
    return source.normalization(data)


def _arrays(config: Experiment, weights: TrainState | Imported) -> tuple[Tree, Tree]:
    """Parameters and statistics as the network of `config` has them."""
    trees = weights.params, weights.batch_stats
    trees = jax.tree.map(lambda x: jnp.array(x, param_dtype(config.model)), trees)
    return stack(trees) if config.model.scan_blocks else trees


def _check_flags(config: Experiment, told: Flags, uses_training_images: bool) -> None:
    """Raises ConfigError for a setting given on the command line that would change nothing."""
    cli.check_effects([config])
    _check_validation(config.data.preprocess, uses_training_images)
    if "data.preprocess" in cli.overrides() and told.preprocess.value is not None:
        raise ConfigError(
            "--config.data.preprocess would change nothing: --preprocess is given, too"
        )


def _check_validation(preprocess: Preprocess, uses_training_images: bool) -> None:
    is_used = uses_training_images and preprocess in FROM_TRAINING_IMAGES
    if "data.validation" in cli.overrides() and not is_used:
        raise ConfigError(
            "--config.data.validation would change nothing: no training image is needed here"
        )


def _with_preprocess(config: Experiment, told: Flags) -> Experiment:
    if told.preprocess.value:
        config.data.preprocess = told.preprocess.value
    return config
