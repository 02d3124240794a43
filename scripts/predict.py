"""What a network sees in images: `python scripts/predict.py --checkpoint resnet50.pth IMAGE...`.

IMAGE is a file, or a folder whose images, also those in folders within it, are taken in the order
of their names. Printed are the five likeliest classes with their probabilities, or with --json one
line of JSON for each image: {"image", "classes": [{"class": number, "name", "probability"}, ...]},
or {"image", "error"}. An image that cannot be read is named, and when the others are done the exit
code is 2.

--checkpoint is a run or one of its checkpoints, a PyTorch file, the name of published weights, or a
folder of Hugging Face's or its name on the Hub. A run knows how its images are cut, and what its
classes are called; so does a folder with a preprocessor_config.json. Else the middle of a
photograph is taken (short side 256, crop 224), or for a network that was trained on images of 32
pixels a square of 32. `--config.data.resize`, crop, interpolation and preprocess say otherwise.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags

from flax_resnet import cli, places, subject
from flax_resnet.config import Experiment
from flax_resnet.data import class_names, folder, images
from flax_resnet.data.encoded import spelled
from flax_resnet.data.images import BadImageError
from flax_resnet.data_config import SIDE, USUAL_SIZES
from flax_resnet.errors import ConfigError, DatasetError
from flax_resnet.places import Url
from flax_resnet.resnet import abstract
from flax_resnet.settings import require
from flax_resnet.subject import Subject
from flax_resnet.training import predictions
from flax_resnet.training.mirror import fetch
from flax_resnet.training.predictions import Network, Pixels
from flax_resnet.weights import pretrained

SHOWN = 5  # bad images that the last line names

CHECKPOINT = cli.define_place(
    "checkpoint",
    None,
    "WORKDIR, WORKDIR/checkpoints/STEP, .../best, a PyTorch file, a bucket's URL, the name of "
    "published weights, or a model on the Hub, hf://ORG/NAME",
    hub=True,
)
READING = subject.define_flags()
CLASS_NAMES = cli.define_path(
    "class_names", None, "a file of the names of the network's classes, one a line or JSON"
)
JSON = flags.DEFINE_bool("json", False, "print one line of JSON for each image")
flags.mark_flag_as_required("checkpoint")
cli.define_overrides(
    "A run's own hold where none is given; the defaults of a new run are:",
    (
        *("data.name", "data.dir", "data.preprocess", "data.mean", "data.std"),
        *("data.resize", "data.crop", "data.interpolation", "data.threads"),
        *("model.depth", "model.shortcut", "model.channel_pad", "model.batch_norm_epsilon"),
        *("model.stride", "model.dtype"),
    ),
)


def main(*names: str) -> None:
    paths = [path for name in names for path in images_of(name)]
    jax.config.update("jax_enable_x64", True)  # it may hold float64; `override` decides
    path, stream = locate(CHECKPOINT.value), sys.stderr if JSON.value else sys.stdout
    tell = functools.partial(print, file=stream)
    network = subject.read(path, READING, check, None, with_view, tell)
    config, titles = network.config, class_titles(network)
    data = config.data
    resize, crop, _ = data.view
    tell(
        f"{network.title}, preprocess {data.preprocess.value}, resize {resize}, crop {crop}, "
        f"{data.interpolation.value}"
    )
    shown = Network(
        *(abstract(config.model)[0], network.params, network.batch_stats, network.normalization),
        batch_size=config.eval_batch_size,
        side=data.side,
        fills_up=False,
    )
    bad: dict[int, str] = {}

    def look(index: int) -> list[Pixels]:
        try:
            image = images.decode(paths[index].read_bytes())
            return predictions.as_evaluated(image, data)
        except OSError as e:
            bad[index] = e.strerror or str(e)
        except BadImageError as e:
            bad[index] = str(e)
        return []

    unknown = np.full(len(paths), -1, np.int32)
    found = predictions.predict(shown, unknown, look, threads=data.num_threads)
    for i, path in enumerate(paths):
        likeliest = list(zip(found.top[i].tolist(), found.probability[i].tolist(), strict=True))
        as_text = as_json if JSON.value else for_people
        print(as_text(path, likeliest, titles, bad.get(i)))
    if bad:
        told = [f"{spelled(paths[i])} ({bad[i]})" for i in sorted(bad)]
        rest = f" and {len(told) - SHOWN} more" * (len(told) > SHOWN)
        raise DatasetError(
            f"{len(bad)} of {len(paths)} images cannot be read: {', '.join(told[:SHOWN])}{rest}"
        )


def images_of(name: str) -> list[Path]:
    """The file itself, or the images in a folder. Raises DatasetError for a folder without any."""
    path = places.local_path(name, "IMAGE")
    if not path.is_dir():
        return [path]
    found = folder.images_below(path, [])
    if not found:
        kinds = ", ".join(folder.SUFFIXES)
        raise DatasetError(f"{spelled(path)} must hold images ({kinds}), got none")
    return [path / inner for inner in found]


def locate(place: Path | Url) -> Path:
    """A local path of --checkpoint; a name that is no file is that of published weights."""
    if isinstance(place, Path) and not place.exists() and place.name == str(place):
        return pretrained.find(place)
    return fetch(place)


def with_view(config: Experiment, is_run: bool) -> Experiment:
    """Images of any size are cut to the one that the network was trained on."""
    data, is_large = config.data, "conv7" in config.model.stem.value
    resize, crop, _ = data.view
    if resize is None:
        usual = USUAL_SIZES if is_large and not is_run else (SIDE, SIDE)
        data.resize, data.crop = usual[0], crop or usual[1]
    return config


def check(config: Experiment) -> None:
    """Raises ConfigError for a network of other images than those of three colours."""
    channels = config.model.image_channels
    require(channels == 3, "model.image_channels", "3, as images have", channels)


def class_titles(network: Subject) -> list[str | None]:
    """What each class is called; None: not known."""
    number = network.config.model.num_classes
    if CLASS_NAMES.value is not None:
        return [names[-1] for names in class_names.read(CLASS_NAMES.value, number)]
    if network.classes is not None and len(network.classes) != number:
        raise ConfigError(
            f"{network.title} names {len(network.classes)} classes and has {number}; --class_names "
            "says what they are"
        )
    return list(network.classes or [None] * number)


Likeliest = list[tuple[int, float]]  # classes with their probabilities


def for_people(path: Path, likeliest: Likeliest, titles: list[str | None], bad: str | None) -> str:
    if bad:
        return f"{spelled(path)}: cannot be read ({bad})"
    lines = [f"{100 * p:7.2f} %  {titles[i] or f'class {i}'}" for i, p in likeliest]
    return "\n".join([spelled(path), *lines])


def as_json(path: Path, likeliest: Likeliest, titles: list[str | None], bad: str | None) -> str:
    if bad:
        return json.dumps({"image": spelled(path), "error": bad})
    classes = [{"class": i, "name": titles[i], "probability": p} for i, p in likeliest]
    return json.dumps({"image": spelled(path), "classes": classes})


if __name__ == "__main__":
    cli.run(main, "IMAGE...")
