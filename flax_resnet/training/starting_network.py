"""The network that `config.init` names, for a run that takes it from there (`config.init_model`).

So a file is fine-tuned without saying what is in it. What the run then trains is written out in its
config.json, and the file is needed no more.
"""

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

from flax_resnet.config import OF_THE_RUN, DataConfig, Experiment, ResNetConfig
from flax_resnet.data import source
from flax_resnet.data_config import OF_32_PIXELS
from flax_resnet.nn.modules import HEAD
from flax_resnet.parallel.processes import on_first
from flax_resnet.training.starting_weights import Kind, find_weights, images_of
from flax_resnet.training.workdir import has_begun, locate, read_config, read_data_facts
from flax_resnet.weights import files, pretrained
from flax_resnet.weights.state_dict import from_state_dict

log = logging.getLogger(__name__)

# What of the preprocessing is taken. Of an image's size, where both see photographs.
NUMBERS, SIZES = ("preprocess", "mean", "std"), ("resize", "crop", "interpolation")


def with_network_of(config: Experiment, workdir: Path) -> Experiment:
    """`config` with the network that `config.init` names; `config` itself without `init_model`.

    It has as many classes as the data set, with a new classifier if those of the weights are not as
    many. Its preprocessing is taken, too, but for what `config` sets to another value than the
    default. A run that has begun in `workdir` goes on with what it took. Of several processes only
    the first needs the weights.

    Raises:
        ConfigError: there are none of that name, or no config has such a network.
        WeightsError, CheckpointError: they are damaged, or hold no network of ours.
        DatasetError: the data set is missing.
    """
    if not config.init_model:
        return config
    tree = on_first(lambda: taken(config, workdir).to_dict())
    theirs = Experiment.from_dict(tree)
    ours = copy.deepcopy(config)
    ours.model = dataclasses.replace(theirs.model, **own(config.model))
    take_preprocessing(ours.data, theirs.data)
    ours.init_fresh = theirs.init_fresh
    ours.validate()
    return ours


def own(model: ResNetConfig) -> dict[str, Any]:
    """The settings of a network that are not taken from elsewhere."""
    names = [path.removeprefix("model.") for path in OF_THE_RUN]
    return {name: getattr(model, name) for name in names}


def take_preprocessing(ours: DataConfig, theirs: DataConfig) -> None:
    """What is as `DataConfig()` has it becomes as it is there."""
    default, names = DataConfig(), []
    if ours.preprocess is default.preprocess:
        names += NUMBERS
    if not {ours.name, theirs.name} & {*OF_32_PIXELS}:
        names += [name for name in SIZES if getattr(ours, name) == getattr(default, name)]
    for name in names:
        setattr(ours, name, getattr(theirs, name))


def taken(config: Experiment, workdir: Path) -> Experiment:
    """`with_network_of` in the first process."""
    found = copy.deepcopy(config)
    before = read_config(workdir) if has_begun(workdir) else None
    if before is not None and before.init_model and before.init == config.init:
        # A new classifier has the new classes.
        found.model, is_new = before.model, HEAD in before.init_fresh
        take_preprocessing(found.data, before.data)
    else:
        found.model, is_new = read_network(found), False
    classes = len(source.class_names(config.data))
    if (is_new or classes != found.model.num_classes) and HEAD not in found.init_fresh:
        found.init_fresh = (*found.init_fresh, HEAD)
    found.model.num_classes = classes
    return found


def read_network(config: Experiment) -> ResNetConfig:
    """The network of `config.init`; its preprocessing becomes that of `config`."""
    kind, path = find_weights(config.init or "")
    is_certain = True
    if kind is Kind.TORCH:
        contents = files.read(path)
        imported = from_state_dict(contents.state_dict, header=contents.header)
        model, theirs = imported.config, images_of(contents, imported)
        is_certain = contents.preprocess is not None
    elif kind is Kind.PUBLISHED:
        card = pretrained.read_card(path)
        model, theirs = card.config.model, card.config.data
    else:
        run = read_config(directory := locate(path)[0])
        model, theirs = run.model, run.data
        # A work directory of convert.py knows nothing of data but what was assumed.
        is_certain = read_data_facts(directory) is not None
    if not is_certain and config.data.preprocess is DataConfig().preprocess:
        told = "%s does not tell data.preprocess: taken to be the usual, %s"
        log.warning(told, path, theirs.preprocess.value)
    take_preprocessing(config.data, theirs)
    return ResNetConfig.of(model.architecture)
