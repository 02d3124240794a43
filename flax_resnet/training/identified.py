"""What a file of weights does not say, by its statistics where images are at hand: for the scripts.

What is told on the command line holds, what the statistics settle comes next, and the rest is
assumed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_resnet.config import DataConfig, Preprocess
from flax_resnet.data import source
from flax_resnet.data.pixels import NAMED, Normalization, make_normalization
from flax_resnet.errors import ConfigError
from flax_resnet.settings import as_given
from flax_resnet.weights.identify import (
    DECIDING,
    NETWORK,
    NUM_IMAGES,
    Colours,
    Identified,
    Read,
    Reading,
    identify,
    tells_nothing,
)
from flax_resnet.weights.infer import usual_preprocess
from flax_resnet.weights.state_dict import Imported

MOST_IMAGES = 1000  # of a streamed data set, that are decoded
SUSPECT = 0.01  # divergence from which it is worth to see what else it could be than was told
CONTRADICTS = 5.0  # how many times nearer something else must be to what was told


class Material(NamedTuple):
    """What readings are tried on."""

    image: np.ndarray  # uint8 (n, h, w, 3)
    constants: dict[str, Normalization]  # of each preprocessing by name
    name: str  # of the data set


class Settled(NamedTuple):
    """How a file is to be read."""

    imported: Imported  # `assumed` has what is no more than that
    preprocess: Preprocess | None  # None: neither told nor found
    lines: list[str]  # what is to be said of it, warnings included


def material(config: DataConfig, number: int = NUM_IMAGES) -> Material:
    """Training images from all over the data set, and the constants of every preprocessing.

    Raises:
        DatasetError: the dataset is missing or damaged.
    """
    config = DataConfig(name=config.name, dir=config.dir)
    image = source.sample(config, source.load(config, ("train",))["train"], MOST_IMAGES)
    constants = {x.value: make_normalization(x, image) for x in NAMED}
    chosen = np.linspace(0, len(image) - 1, min(number, len(image))).astype(int)
    return Material(image[chosen], constants, config.name.value)


def settle(
    read: Read, told: Mapping[str, Any], preprocess: Preprocess | None, data: DataConfig | None
) -> Settled:
    """A file read as it is told to be, else as its statistics tell, else as is usual.

    Args:
        read: the file as a network; see `weights.identify.identify`.
        told: by the name of `Reading`'s fields, what the user says; None for what he does not.
        preprocess: what the file says itself, if it does.
        data: whose training images are to be looked at; None for none.
    """
    told = {name: value for name, value in told.items() if value is not None}
    is_given = bool(told)
    given = preprocess or told.get("preprocess")
    if given:
        told["preprocess"] = given.value
    imported = read(**{name: told.get(name) for name in NETWORK})
    is_open = given is None or not imported.assumed.keys().isdisjoint(DECIDING)
    if data is None or not (is_open or is_given) or tells_nothing(imported):
        return Settled(imported, given, [])
    images = material(data)
    found = identify(read, images.image, images.constants, told)
    if found is None:
        return Settled(imported, given, [])
    where = f"BatchNorm's statistics, on {len(images.image)} images of {images.name}"
    lines = contradictions(read, images, told, found)
    if found.is_bad:
        warning = (
            f"warning: no reading fits {where} (the best, {described(found.best)}, has divergence "
            f"{found.divergence:.2g}): other images than it was trained on, or damaged statistics"
        )
        return Settled(imported, given, lines or [warning])
    assumed = {name: getattr(imported.config, name) for name in NETWORK}
    usual = usual_preprocess(imported.config.architecture, imported.layout).value
    reading = found.near(assumed | {"preprocess": usual, "colours": Colours.RGB})
    if reading.colours is Colours.BGR:
        lines.append("warning: its images were BGR (as OpenCV reads them), here they are RGB")
    if not is_open:
        return Settled(imported, given, lines)
    network = read(**{name: getattr(reading, name) for name in NETWORK})
    config = dataclasses.replace(network.config, batch_norm_epsilon=reading.epsilon)
    known = {*DECIDING}
    if reading.epsilon != network.config.batch_norm_epsilon:
        known.add("batch_norm_epsilon")
    rest = {name: text for name, text in imported.assumed.items() if name not in known}
    imported = network._replace(config=config, assumed=rest)
    lines = [f"by {where}: {described(reading)} ({evidence(found)})", *lines]
    return Settled(imported, Preprocess(reading.preprocess), lines)


def contradictions(
    read: Read, images: Material, told: Mapping[str, Any], found: Identified
) -> list[str]:
    """A warning if the statistics say clearly that what was told is wrong."""
    if not told or found.divergence < SUSPECT:
        return []
    free = identify(read, *images[:2])
    if free is None or free.is_bad or free.divergence * CONTRADICTS > found.divergence:
        return []
    wrong = [name for name, value in told.items() if getattr(free.best, name) != value]
    instead = ", ".join(f"{name} {as_given(getattr(free.best, name))}" for name in wrong)
    return [
        f"warning: its statistics contradict what was given; they say {instead} (divergence "
        f"{free.divergence:.2g}, as given {found.divergence:.2g})"
    ]


def evidence(found: Identified) -> str:
    """How clear a result is."""
    text = f"divergence {found.divergence:.2g}"
    if found.second is not None:
        text += f", the next reading's {found.second:.2g}"
    if found.unsure:
        text += f": too thin to tell {' and '.join(found.unsure)}"
    return text


def described(reading: Reading) -> str:
    """Such as "shortcut A, channel_pad end, preprocess own_mean"."""
    fields = (*DECIDING[:-1], *(["colours"] if reading.colours is Colours.BGR else []))
    parts = [(name, getattr(reading, name)) for name in fields]
    return ", ".join(f"{name} {as_given(value)}" for name, value in parts if value is not None)


# --- The command itself -------------------------------------------------------------------


def preprocessings(means: list[str], stds: list[str]) -> dict[str, Normalization]:
    """Those of --mean and --std, by a name.

    Raises:
        ConfigError: they are no three numbers, or not as many of one as of the other.
    """
    if len(means) != len(stds):
        raise ConfigError(
            f"--mean and --std must be given together, got {len(means)} and {len(stds)} of them"
        )
    found: dict[str, Normalization] = {}
    for mean, std in zip(means, stds, strict=True):
        a, b = three(mean, "mean"), three(std, "std")
        if not (b > 0).all():
            raise ConfigError(f"--std must be above 0, got {std}")
        scale = 1.0 if max(*a, *b) > 1 else 1 / 255
        found[f"mean {mean} std {std}"] = Normalization(scale, a, b)
    return found


def three(text: str, name: str) -> np.ndarray:
    try:
        numbers = np.array([float(part) for part in text.split(",")])
    except ValueError:
        numbers = np.array([])
    if numbers.shape != (3,) or not np.isfinite(numbers).all():
        raise ConfigError(f"--{name} must be three numbers, r,g,b, got {text!r}")
    return numbers


def conclusion(found: Identified) -> str:
    """What a whole identification comes to, in a sentence."""
    if found.is_bad:
        return (
            f"no reading fits ({evidence(found)}): other images than it was trained on (see "
            "--config.data.name), a preprocessing that was not tried (--mean, --std), or damaged "
            "statistics"
        )
    kind = "the nearest is" if found.unsure else "it is"
    return f"{kind}: {described(found.best)} ({evidence(found)})"


def compared(claimed: Mapping[str, Any], found: Identified) -> str:
    """Whether a checkpoint says the same of itself; what is not settled does not contradict it."""
    mine = found.best._asdict()
    wrong = [
        f"{name} {as_given(value)}"
        for name, value in claimed.items()
        if mine[name] is not None and mine[name] != value and name not in found.unsure
    ]
    if found.is_bad:
        return "what it says of itself is neither confirmed nor contradicted"
    return f"warning: it says of itself {', '.join(wrong)}" if wrong else "it says so itself"
