"""Test error of a network: `python scripts/evaluate.py --checkpoint runs/resnet20`.

A work directory stands for its newest checkpoint, `WORKDIR/checkpoints/STEP` for that one,
`WORKDIR/checkpoints/best` for the one with the lowest error that the run itself measured, and a
PyTorch file (.pt, .pth, .th, .safetensors) for itself. Settings are the run's own, or what the
file's keys tell; each can be overridden: `--config.data.dir=...`. A PyTorch file does not tell its
preprocessing, nor always its shortcut and padding: what BatchNorm's statistics tell of them (see
scripts/identify.py), and what else is assumed, is printed; `--preprocess`,
`--config.model.shortcut` and `--config.model.channel_pad` set it.

Of photographs (`--config.data.name=folder --config.data.dir=DIR`) the middle is shown, or with
--crops=10 or --scales more of each, whose probabilities are averaged. A network of other classes is
evaluated on those that both have, if --class_names tells what its own are called.

The last line printed is JSON: {"test_error": fraction, "top5_error": fraction of the images whose
class is not among the five likeliest, "test_loss": nats per example, "examples": count}.
"""

import functools
import json

import jax
from absl import flags
from tqdm import tqdm

from flax_resnet import cli, subject
from flax_resnet.config import DataConfig, Experiment, Placement
from flax_resnet.data import class_names, source
from flax_resnet.data.examples import Examples
from flax_resnet.data.source import Split
from flax_resnet.data_config import LARGEST_SIDE
from flax_resnet.errors import ConfigError
from flax_resnet.resnet import abstract
from flax_resnet.settings import require
from flax_resnet.subject import Subject
from flax_resnet.training import predictions
from flax_resnet.training.evaluation import TANJEFFREYZ_BATCH_SIZE
from flax_resnet.training.mirror import fetch
from flax_resnet.training.predictions import Network, Predictions

SLOW_IMAGES = 500  # from which it is worth to show how many are done

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
CROPS = flags.DEFINE_enum(
    "crops", "1", ["1", "10"], "of each photograph: the middle, or also the corners, and mirrored"
)
SCALES = flags.DEFINE_list(
    "scales",
    [],
    "instead of crops, short sides of whole photographs, such as the paper's 224,256,384,480,640",
)
CLASS_NAMES = cli.define_path(
    "class_names",
    None,
    "a file of the names of the network's classes, one a line or JSON; those of the images' "
    "classes compete alone",
)
flags.mark_flag_as_required("checkpoint")
cli.define_overrides(
    "The run's own hold where none is given; the defaults of a new run are:",
    (
        *("data.name", "data.dir", "data.tfds", "data.preprocess", "data.mean", "data.std"),
        *("data.resize", "data.crop", "data.interpolation", "data.validation", "data.allow_bad"),
        *("data.placement", "data.threads"),
        *("model.depth", "model.shortcut", "model.channel_pad", "model.batch_norm_epsilon"),
        *("model.stride", "model.dtype", "model.scan_blocks", "model.remat"),
        "train.eval_batch_size",
    ),
)


def main() -> None:
    path = fetch(CHECKPOINT.value)
    jax.config.update("jax_enable_x64", True)  # it may hold float64; `override` decides
    told = cli.overrides()
    images = DataConfig(name=told.get("data.name", DataConfig.name), dir=told.get("data.dir"))
    # Of other images than those it was trained on, BatchNorm's statistics tell little.
    hints = images if source.is_small(images) else None
    network = subject.read(path, READING, check, hints, with_placement)
    data = network.config.data
    outputs = chosen_outputs(network)
    print(f"{network.title}, preprocess {data.preprocess.value}{views_shown()}")
    found = evaluate(network, source.load(data, ("test",))["test"], outputs)
    print(json.dumps(found.summary() | {"examples": len(found.label)}))


def with_placement(config: Experiment, is_run: bool) -> Experiment:
    """Photographs are seen once, so that they need not be on the devices all at once."""
    name = cli.overrides().get("data.name", config.data.name)
    if not source.is_small(DataConfig(name=name)):
        config.data.placement = Placement.STREAMED
    return config


def evaluate(network: Subject, test: Split, outputs: list[int] | None) -> Predictions:
    """What the network says of every test image."""
    config, is_resident = network.config, isinstance(test, Examples)
    side, by_batch = config.data.side, BATCH_STATISTICS.value
    shown = Network(
        *(abstract(config.model)[0], network.params, network.batch_stats, network.normalization),
        outputs=outputs,
        batch_size=TANJEFFREYZ_BATCH_SIZE if by_batch else config.eval_batch_size,
        side=side,
        fills_up=is_resident,
        by_batch_statistics=by_batch,
    )
    view = functools.partial(predictions.as_evaluated, config=config.data)
    if CROPS.value == "10":
        view = functools.partial(predictions.ten_crops, config=config.data)
    if SCALES.value:
        view = functools.partial(predictions.at_scales, config=config.data, scales=scales())
    size = len(test.label)
    with tqdm(total=size, unit="image", disable=is_resident or size < SLOW_IMAGES) as bar:
        return predictions.predict(
            shown,
            test.label,
            predictions.looks(test, view),
            threads=0 if is_resident else config.data.num_threads,
            after=lambda done: bar.update(),
        )


def check(config: Experiment) -> None:
    """Raises ConfigError for a network of other classes, or a flag that would change nothing."""
    data, told = config.data, cli.overrides()
    if CLASS_NAMES.value is None:
        check_classes(config)
    require(
        config.model.image_channels == 3, "model.image_channels", "3", config.model.image_channels
    )
    if BATCH_STATISTICS.value and "train.eval_batch_size" in told:
        raise ConfigError(
            "--config.train.eval_batch_size would change nothing: --batch_statistics has its own"
        )
    several = ["--crops=10"] * (CROPS.value == "10") + ["--scales"] * bool(SCALES.value)
    if several and (source.is_small(data) or data.placement is Placement.RESIDENT):
        raise ConfigError(
            f"{several[0]} is for photographs: --config.data.name=folder or tfds, and streamed"
        )
    if len(several) > 1:
        raise ConfigError("--crops=10 would change nothing: --scales shows whole images")
    if several and BATCH_STATISTICS.value:
        raise ConfigError(f"{several[0]} would change nothing: --batch_statistics has one view")
    resize, crop, _ = data.view
    if CROPS.value == "10":
        rule = f"at least data.crop ({crop}) for ten crops"
        require((resize or 0) >= (crop or 0), "data.resize", rule, resize)
    for name in ("data.resize", "data.crop") if SCALES.value else ():
        if name in told:
            raise ConfigError(f"--config.{name} would change nothing: --scales is given")
    scales()


def check_classes(config: Experiment) -> None:
    """Raises ConfigError unless the network has as many classes as the images."""
    if source.is_small(config.data):
        source.check_network(config.data, config.model)
        return
    classes, given = len(source.class_names(config.data)), config.model.num_classes
    if classes != given:
        raise ConfigError(
            f"the images must have the network's {given} classes, got {classes}; --class_names "
            "names the network's, so that those of the images compete alone"
        )


def scales() -> list[int]:
    """Those of --scales. Raises ConfigError for what is no side."""
    found = [int(text) if text.strip().isdecimal() else 0 for text in SCALES.value]
    rule = f"sides of 1 to {LARGEST_SIDE} pixels, without a space between"
    is_right = all(1 <= side <= LARGEST_SIDE for side in found)
    require(is_right, "--scales", rule, ",".join(SCALES.value))
    return found


def views_shown() -> str:
    if SCALES.value:
        return f", {2 * len(scales())} views of each image: scales {','.join(SCALES.value)}"
    return ", 10 crops of each image" if CROPS.value == "10" else ""


def chosen_outputs(network: Subject) -> list[int] | None:
    """Which of the network's outputs stand for the classes of the images; None: all, in order."""
    classes = source.class_names(network.config.data)
    if CLASS_NAMES.value is not None:
        path, number = CLASS_NAMES.value, network.config.model.num_classes
        return class_names.outputs_of(classes, class_names.read(path, number), str(path))
    if network.classes is None:
        return None
    if set(network.classes) != set(classes):
        first = ", ".join(network.classes[:3])
        print(
            f"warning: the network's classes have other names ({first}, ...) than the images' "
            f"({', '.join(classes[:3])}, ...); they are taken to be the same in that order"
        )
    return class_names.in_order(classes, network.classes)


if __name__ == "__main__":
    cli.run(main)
