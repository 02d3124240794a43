"""Test error of a network: `python scripts/evaluate.py --checkpoint runs/resnet20`.

A work directory stands for its newest checkpoint, `WORKDIR/checkpoints/STEP` for that one,
`WORKDIR/checkpoints/best` for the one with the lowest error that the run itself measured, and a
PyTorch file (.pt, .pth, .th, .safetensors) for itself. Settings are the run's own, or what the
file's keys tell; each can be overridden: `--config.data.dir=...`. A PyTorch file does not tell its
preprocessing, nor always its shortcut and padding: what BatchNorm's statistics tell of them (see
scripts/identify.py), and what else is assumed, is printed; `--preprocess`,
`--config.model.shortcut` and `--config.model.channel_pad` set it. The last line printed is JSON:
{"test_error": fraction, "test_loss": nats per example, "examples": count}.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from flax_resnet import cli
from flax_resnet.config import DataConfig, Experiment, Preprocess
from flax_resnet.data import source
from flax_resnet.data.pixels import FROM_TRAINING_IMAGES, Normalization
from flax_resnet.errors import ConfigError
from flax_resnet.nn.scan import Tree, stack
from flax_resnet.parallel import sharding
from flax_resnet.resnet import param_dtype
from flax_resnet.step import TrainState, init
from flax_resnet.training.evaluation import Evaluation, make_evaluate_by_batch_statistics
from flax_resnet.training.identified import settle
from flax_resnet.training.mirror import fetch
from flax_resnet.training.workdir import is_run, open_run, read_config, read_data_facts
from flax_resnet.weights import account, files
from flax_resnet.weights.state_dict import Imported, from_state_dict

CHECKPOINT = cli.define_place(
    "checkpoint",
    None,
    "WORKDIR, WORKDIR/checkpoints/STEP, .../best or a PyTorch file; also by a bucket's URL, or a "
    "model on the Hub, hf://ORG/NAME",
    hub=True,
)
ENTRY = flags.DEFINE_string(
    "entry",
    None,
    "of weights from PyTorch, with several state dicts: its name, such as state_dict_ema",
)
RENAME = flags.DEFINE_multi_string(
    "rename",
    [],
    "of weights from PyTorch with other keys: 'OLD=NEW', a regular expression; repeatable",
)
IGNORE = flags.DEFINE_multi_string(
    "ignore", [], "of weights from PyTorch with keys too many: a regular expression; repeatable"
)
PREPROCESS = flags.DEFINE_enum_class("preprocess", None, Preprocess, "how pixels become numbers")
BATCH_STATISTICS = flags.DEFINE_bool(
    "batch_statistics", False, "evaluate as tanjeffreyz did: BatchNorm uses the test batch's"
)
flags.mark_flag_as_required("checkpoint")
cli.define_overrides(
    "The run's own hold where none is given; the defaults of a new run are:",
    (
        *("data.name", "data.dir", "data.preprocess", "data.validation"),
        *("model.depth", "model.shortcut", "model.channel_pad", "model.batch_norm_epsilon"),
        *("model.dtype", "model.scan_blocks", "model.remat"),
        "train.eval_batch_size",
    ),
)


class Subject(NamedTuple):
    """What is to be evaluated."""

    config: Experiment
    params: Tree
    batch_stats: Tree
    normalization: Normalization
    title: str


def main() -> None:
    path = fetch(CHECKPOINT.value)
    jax.config.update("jax_enable_x64", True)  # it may hold float64; `override` decides
    subject = read_run(path) if is_run(path) else read_torch(path)
    config, params, batch_stats, constants, title = subject
    print(f"{title}, preprocess {config.data.preprocess.value}")
    test = source.load(config.data, ("test",))["test"]
    mesh = sharding.data_mesh()
    if BATCH_STATISTICS.value:
        evaluate = make_evaluate_by_batch_statistics(config.model, constants, mesh)
    else:
        size = config.eval_batch_size
        evaluate = Evaluation(config.model, init(config)[0], constants, mesh, size)
    result = evaluate(*sharding.replicate(mesh, (params, batch_stats, test))).mean()
    tree = {"test_error": result["error"], "test_loss": result["loss"]}
    print(json.dumps(tree | {"examples": len(test.label)}))


def read_run(path: Path) -> Subject:
    for flag in (ENTRY, RENAME, IGNORE):
        if flag.present:
            raise ConfigError(f"--{flag.name} would change nothing: {path} is no PyTorch file")
    run = open_run(path)
    config = with_preprocess(cli.override(read_config(run.directory)))
    if config.model.architecture != run.config.model.architecture:
        raise ConfigError(
            f"{run.directory} says itself what its network is; --config.model takes dtype, "
            "scan_blocks and remat of a run, nothing else"
        )
    kept = read_data_facts(run.directory)
    source.check_network(config.data, config.model)
    # Also where a run kept nothing, such as a converted one: of the data that the flags name.
    is_kept = kept is not None and config.data.preprocess is run.config.data.preprocess
    check_flags(config, uses_training_images=not is_kept)
    constants = kept.normalization if kept and is_kept else source.normalization(config.data)
    title = f"{run.directory}, step {run.step}"
    return Subject(config, *arrays(config, run.state), constants, title)


def read_torch(path: Path) -> Subject:
    contents = files.read(path, ENTRY.value)
    told, header = cli.overrides(), contents.header
    epsilon = told.get("model.batch_norm_epsilon")
    read = functools.partial(
        from_state_dict,
        contents.state_dict,
        batch_norm_epsilon=epsilon,
        depth=told.get("model.depth"),
        header=header,
        rename=RENAME.value,
        ignore=IGNORE.value,
    )
    given = {name: told.get(f"model.{name}") for name in ("shortcut", "channel_pad", "stride")}
    given |= {"epsilon": epsilon, "preprocess": PREPROCESS.value or told.get("data.preprocess")}
    if known := given["preprocess"] or contents.preprocess:
        check_validation(known, header is None or header.normalization is None)
    data = DataConfig(name=told.get("data.name", DataConfig.name), dir=told.get("data.dir"))
    imported, found, lines = settle(read, given, contents.preprocess, data)
    for line in [*account.unwrapping(imported, contents.told), *lines]:
        print(line)
    for assumption in imported.assumed.values():
        print(f"assumed: {assumption}")
    preprocess = contents.preprocess or found or contents.likely_preprocess(imported)
    usual = DataConfig(preprocess=preprocess)
    model = dataclasses.replace(imported.config)
    config = with_preprocess(cli.override(Experiment(model=model, data=usual)))
    if config.model.architecture != imported.config.architecture:
        raise ConfigError(
            f"{path} tells itself what its network is; --config.model takes the shortcut, "
            "channel_pad, stride, batch_norm_epsilon, depth, dtype, scan_blocks and remat of a "
            "PyTorch file, nothing else"
        )
    source.check_network(config.data, config.model)
    if contents.preprocess and config.data.preprocess is not preprocess:
        raise ConfigError(
            f"data.preprocess must be {preprocess.value}, as the header of {path} says, got "
            f"{config.data.preprocess.value}"
        )
    constants = header and header.normalization
    check_flags(config, uses_training_images=constants is None)
    constants = constants or source.normalization(config.data)
    title = f"{path}, layout {imported.layout.value}"
    return Subject(config, *arrays(config, imported), constants, title)


def arrays(config: Experiment, weights: TrainState | Imported) -> tuple[Tree, Tree]:
    """Parameters and statistics as the network of `config` has them."""
    trees = weights.params, weights.batch_stats
    trees = jax.tree.map(lambda x: jnp.array(x, param_dtype(config.model)), trees)
    return stack(trees) if config.model.scan_blocks else trees


def check_flags(config: Experiment, uses_training_images: bool) -> None:
    """Raises ConfigError for a setting given on the command line that would change nothing."""
    cli.check_effects([config])
    check_validation(config.data.preprocess, uses_training_images)
    reasons = {
        "data.preprocess": "" if PREPROCESS.value is None else "--preprocess is given, too",
        "train.eval_batch_size": "--batch_statistics has its own" if BATCH_STATISTICS.value else "",
    }
    for path in cli.overrides():
        if reason := reasons.get(path):
            raise ConfigError(f"--config.{path} would change nothing: {reason}")


def check_validation(preprocess: Preprocess, uses_training_images: bool) -> None:
    is_used = uses_training_images and preprocess in FROM_TRAINING_IMAGES
    if "data.validation" in cli.overrides() and not is_used:
        raise ConfigError(
            "--config.data.validation would change nothing: no training image is needed here"
        )


def with_preprocess(config: Experiment) -> Experiment:
    if PREPROCESS.value:
        config.data.preprocess = PREPROCESS.value
    return config


if __name__ == "__main__":
    cli.run(main)
