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

import json

import jax
from absl import flags

from flax_resnet import cli, subject
from flax_resnet.config import DataConfig, Experiment
from flax_resnet.data import source
from flax_resnet.errors import ConfigError
from flax_resnet.parallel import sharding
from flax_resnet.step import init
from flax_resnet.training.evaluation import Evaluation, make_evaluate_by_batch_statistics
from flax_resnet.training.mirror import fetch

CHECKPOINT = cli.define_place(
    "checkpoint",
    None,
    "WORKDIR, WORKDIR/checkpoints/STEP, .../best or a PyTorch file; also by a bucket's URL, or a "
    "model on the Hub, hf://ORG/NAME",
    hub=True,
)
READING = subject.define_flags()
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


def main() -> None:
    path = fetch(CHECKPOINT.value)
    jax.config.update("jax_enable_x64", True)  # it may hold float64; `override` decides
    told = cli.overrides()
    images = DataConfig(name=told.get("data.name", DataConfig.name), dir=told.get("data.dir"))
    config, params, batch_stats, constants, title, _ = subject.read(path, READING, check, images)
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


def check(config: Experiment) -> None:
    """Raises ConfigError for a network of other classes, or a setting that would change nothing."""
    source.check_network(config.data, config.model)
    if BATCH_STATISTICS.value and "train.eval_batch_size" in cli.overrides():
        raise ConfigError(
            "--config.train.eval_batch_size would change nothing: --batch_statistics has its own"
        )


if __name__ == "__main__":
    cli.run(main)
