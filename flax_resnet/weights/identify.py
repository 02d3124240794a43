"""What no key of a checkpoint tells, told by BatchNorm's running statistics.

They are the mean and the variance that the right network saw, fed with the right numbers, on its
training images. So every *reading* of a checkpoint (which network, which preprocessing) is run in
training mode on a few hundred such images, and what each layer sees is compared with what the
checkpoint remembers. The right reading is nearest, by a factor of five to hundreds.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from flax_resnet.config import ChannelPad, DType, Shortcut, Stride
from flax_resnet.data.pixels import Normalization, crop_and_flip, normalize
from flax_resnet.errors import WeightsError
from flax_resnet.nn.cpu import compiler_options
from flax_resnet.nn.scan import Tree, stack
from flax_resnet.resnet import abstract
from flax_resnet.weights.state_dict import Imported
from flax_resnet.weights.trees import tree_to_torch

NUM_IMAGES = 256
PAD = 4  # of the crop that CIFAR's networks train with: pixels on each side
# A variance below it is none: BatchNorm itself adds as much to each.
FLOOR = 1e-5
# docs/weights.md has the measurements behind both.
CLEAR = 1.5  # the next reading is so many times further away: the statistics tell
BAD = 0.02  # divergence beyond which a reading is none

Read = Callable[..., Imported]  # a state dict as a network of the shortcut, ... that are given


class Colours(enum.Enum):
    """The order of an image's channels."""

    RGB = "rgb"
    BGR = "bgr"  # as OpenCV reads them


class Crop(enum.Enum):
    """What surrounded the training images before they were cropped at random.

    Nothing of a network depends on it later, but its statistics do.
    """

    NONE = "none"  # they were not cropped
    ZEROS = "zeros"  # zeros, put there after the pixels became numbers: here, tanjeffreyz
    BLACK = "black"  # black pixels: torchvision's RandomCrop in its usual place


class Reading(NamedTuple):
    """One way to understand a checkpoint; None for what its network does not have."""

    shortcut: Shortcut
    channel_pad: ChannelPad | None
    stride: Stride | None
    epsilon: float  # BatchNorm's
    preprocess: str
    colours: Colours | None  # None: the images are grey
    crop: Crop


# The crop changes no result, and an epsilon matters only beside variances as small as itself.
DECIDING = ("shortcut", "channel_pad", "stride", "preprocess", "colours")
NETWORK = ("shortcut", "channel_pad", "stride")
EPSILONS = (1e-5, 1e-3)  # PyTorch's and Flax's; TensorFlow's


class Moments(NamedTuple):
    """What one BatchNorm has seen."""

    mean: Float[np.ndarray, " c"]
    var: Float[np.ndarray, " c"]


class Identified(NamedTuple):
    """What was found."""

    best: Reading
    divergences: dict[Reading, float]  # of every reading that was tried, the nearest first

    @property
    def divergence(self) -> float:
        """The best reading's."""
        return self.divergences[self.best]

    @property
    def second(self) -> float | None:
        """Divergence of the nearest reading that is another in a field that decides."""
        return min((d for d in map(self.rival, DECIDING) if d is not None), default=None)

    def rival(self, field: str) -> float | None:
        """Divergence of the nearest reading with another value of `field`, if one was tried."""
        mine = getattr(self.best, field)
        others = (d for r, d in self.divergences.items() if getattr(r, field) != mine)
        return next(others, None)

    @property
    def unsure(self) -> list[str]:
        """The fields that decide and that the statistics do not settle."""
        found = ((field, self.rival(field)) for field in DECIDING)
        return [name for name, d in found if d is not None and d < CLEAR * self.divergence]

    @property
    def is_bad(self) -> bool:
        """Whether no reading explains the statistics: wrong images, or damaged weights."""
        return not self.divergence <= BAD

    @property
    def verdict(self) -> str:
        """In a word how sure that is."""
        return "bad" if self.is_bad else "thin" if self.unsure else "clear"

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it; null for what the network or the images do not have."""
        values = {name: getattr(self.best, name) for name in (*DECIDING, "epsilon")}
        return {
            **{name: getattr(value, "value", value) for name, value in values.items()},
            "divergence": self.divergence,
            "second": self.second,
            "unsure": self.unsure,
            "verdict": self.verdict,
        }

    def near(self, reading: Mapping[str, Any]) -> Reading:
        """Of the readings that are about as good as the best, the one most like `reading`."""
        near = [r for r, d in self.divergences.items() if d < CLEAR * self.divergence]
        close = [r for r in near if r.epsilon == self.best.epsilon]
        return min(
            close or [self.best], key=lambda r: sum(getattr(r, k) != v for k, v in reading.items())
        )


NOTHING: dict[str, Any] = {  # `to_dict` where there is nothing to identify
    **dict.fromkeys((*DECIDING, "epsilon", "divergence", "second")),
    "unsure": [],
    "verdict": "nothing",
}


# --- The measure ----------------------------------------------------------------------------------


def divergence(ours: Mapping[str, Moments], theirs: Mapping[str, Moments]) -> float:
    """How far apart the statistics of a network's layers are: 0 if they are the same.

    Of each channel the symmetric Kullback-Leibler divergence of two normal distributions, of these
    the median over a layer's channels, of these the mean over the layers. A channel that is dead or
    rarely fires decides nothing so, and no layer is left out.
    """
    assert ours.keys() == theirs.keys()
    found = [np.median(between(ours[name], theirs[name])) for name in ours]
    return float(np.mean(found))


def between(p: Moments, q: Moments) -> Float[np.ndarray, " c"]:
    """KL(p, q) + KL(q, p) of normal distributions, channel by channel."""
    a, b = (np.asarray(x.var, np.float64) + FLOOR for x in (p, q))
    shift = np.square(np.asarray(p.mean, np.float64) - np.asarray(q.mean, np.float64))
    return (a / b + b / a - 2 + shift * (1 / a + 1 / b)) / 2


def moments(batch_stats: Tree) -> dict[str, Moments]:
    """The running statistics of each BatchNorm, by its name; stacked blocks, too."""
    arrays = tree_to_torch(batch_stats)
    layers = [name.removesuffix(".running_mean") for name in arrays if name.endswith("_mean")]
    return {
        name: Moments(arrays[f"{name}.running_mean"], arrays[f"{name}.running_var"])
        for name in layers
    }


# --- Running a reading ----------------------------------------------------------------------------


class Examination:
    """A checkpoint's readings, run on the same images.

    Args:
        read: see `identify`.
        image: as the data set has it.
        constants: of each preprocessing, by its name.
    """

    def __init__(
        self,
        read: Read,
        image: UInt8[np.ndarray, "n h w 3"],
        constants: Mapping[str, Normalization],
    ):
        self.read, self.image, self.constants = read, image, constants
        rng = np.random.default_rng(0)
        n = len(image)
        offset, flip = rng.integers(0, 2 * PAD + 1, (n, 2), np.int32), rng.random(n) < 0.5
        self.offset_and_flip = offset, flip
        self.divergences: dict[Reading, float] = {}
        self.programs: dict[Reading, tuple[Callable[..., Tree], Tree, dict[str, Moments]]] = {}

    def of(self, reading: Reading) -> float:
        """The divergence of a reading."""
        if reading not in self.divergences:
            found, stored = self.seen(reading)
            self.divergences[reading] = divergence(found, stored)
        return self.divergences[reading]

    def of_first_layer(self, reading: Reading) -> float:
        """That of the first BatchNorm alone, which is the same for every shortcut and stride."""
        found, stored = self.seen(reading, first=True)
        (name,) = found
        return divergence(found, {name: stored[name]})

    def seen(
        self, reading: Reading, first: bool = False
    ) -> tuple[dict[str, Moments], dict[str, Moments]]:
        """What the layers (or the first alone) see of the images, and what is stored."""
        with jax.enable_x64(False):
            run, weights, stored = self.program(reading)
            found = run(*weights, self.input(reading), first=first)
            return moments(jax.device_get(found)), stored

    def program(self, reading: Reading) -> tuple[Callable[..., Tree], Tree, dict[str, Moments]]:
        """A network's compiled forward pass in training mode, its weights and its statistics."""
        key = reading._replace(preprocess="", colours=None, crop=Crop.NONE)
        if key not in self.programs:
            with jax.enable_x64(True):  # they may be float64
                imported = self.read(**network_of(reading))
            trees = jax.tree.map(
                lambda x: np.asarray(x, np.float32), (imported.params, imported.batch_stats)
            )
            config = dataclasses.replace(
                imported.config,
                dtype=DType.FLOAT32,
                batch_norm_epsilon=reading.epsilon,
                batch_norm_momentum=1.0,  # the running statistics become the batch's
                scan_blocks=True,
            )
            graphdef, _, _ = abstract(config)

            @functools.partial(
                jax.jit, static_argnames="first", compiler_options=compiler_options()
            )
            def run(params: Tree, batch_stats: Tree, x: jax.Array, first: bool) -> Tree:
                model = nnx.merge(graphdef, params, batch_stats, copy=True)
                model.train()
                model(x)
                seen = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
                return first_of(seen) if first else seen

            self.programs[key] = run, stack(trees), moments(imported.batch_stats)
        return self.programs[key]

    def input(self, reading: Reading) -> Float[jax.Array, "n h w 3"]:
        """The images as the network is fed with them in training."""
        x = jnp.asarray(self.image)
        offset, flip = map(jnp.asarray, self.offset_and_flip)
        if reading.crop is Crop.BLACK:
            x = crop_and_flip(x.astype(jnp.float32), offset, flip, PAD).astype(jnp.uint8)
        x = normalize(x, self.constants[reading.preprocess], jnp.float32)
        if reading.crop is Crop.ZEROS:
            x = crop_and_flip(x, offset, flip, PAD)
        return x[..., ::-1] if reading.colours is Colours.BGR else x


def first_of(batch_stats: Tree) -> Tree:
    """The statistics of the first BatchNorm alone."""
    if "bn1" in batch_stats:
        return {"bn1": batch_stats["bn1"]}
    return {"stages": {0: {0: {"bn1": batch_stats["stages"][0][0]["bn1"]}}}}


def network_of(reading: Reading) -> dict[str, Any]:
    """What `Read` is to be told."""
    return {name: getattr(reading, name) for name in NETWORK}


# --- The search -----------------------------------------------------------------------------------


def identify(
    read: Read,
    image: UInt8[np.ndarray, "n h w 3"],
    constants: Mapping[str, Normalization],
    told: Mapping[str, Any] | None = None,
) -> Identified | None:
    """The readings of a checkpoint, each with its divergence; None if its statistics tell nothing.

    They tell nothing where no step was trained, and of a network that takes no colour images.

    What the first BatchNorm sees depends on the input alone, not on shortcuts and strides. So it
    chooses an input, that one a network, and the network is run on every other input; should it
    prefer another, all again.

    Args:
        read: the checkpoint as a network of the `shortcut`, `channel_pad` and `stride` given, each
            maybe None; as `from_state_dict` of it.
        image: some that it was trained on, or such: a few hundred, of all classes.
        constants: of the preprocessings that come into question, by name.
        told: the values of those fields of `Reading` that are known.
    """
    told = dict(told or {})
    with jax.enable_x64(True):  # the weights may be float64
        imported = read(**{name: told.get(name) for name in NETWORK})
    if tells_nothing(imported):
        return None
    networks = networks_of(read, imported)
    is_grey = bool((image == image[..., :1]).all())
    inputs = list(
        itertools.product(
            [told["preprocess"]] if "preprocess" in told else constants,
            [None] if is_grey else [told["colours"]] if "colours" in told else Colours,
            Crop,
        )
    )
    own = imported.config.batch_norm_epsilon
    epsilons = [told["epsilon"]] if "epsilon" in told else sorted({own, *EPSILONS})
    examination = Examination(read, image, constants)
    measure = examination.of

    first = {x: examination.of_first_layer(Reading(*networks[0], own, *x)) for x in inputs}
    best = Reading(*networks[0], own, *min(inputs, key=lambda x: first[x]))
    # Each preprocessing and order of colours with its likeliest crop.
    likely = [
        min(group, key=lambda x: first[x])
        for _, pairs in itertools.groupby(inputs, lambda x: x[:2])
        if (group := list(pairs))
    ]
    while True:
        before = best
        best = min((Reading(*n, best.epsilon, *best[4:]) for n in networks), key=measure)
        crops = [(*best[4:6], crop) for crop in Crop]
        best = min((Reading(*best[:4], *x) for x in [*likely, *crops]), key=measure)
        if best == before:
            other = min((best._replace(epsilon=e) for e in epsilons), key=measure)
            if measure(other) * CLEAR > measure(best):
                break
            best = other
    ranked = sorted(examination.divergences.items(), key=lambda item: item[1])
    return Identified(best, dict(ranked))


def tells_nothing(imported: Imported) -> bool:
    """Whether the network has seen no image yet, or none with colours."""
    stored = moments(imported.batch_stats).values()
    is_untouched = all((x.mean == 0).all() and (x.var == 1).all() for x in stored)
    return is_untouched or imported.config.image_channels != 3


def networks_of(read: Read, imported: Imported) -> list[tuple[Any, Any, Any]]:
    """Shortcut, padding and stride of each network that the checkpoint may hold.

    Args:
        imported: the network that is assumed where nothing is known, which is the first.
    """
    assumed, config = imported.assumed, imported.config
    shortcuts = options(config.shortcut, Shortcut, "shortcut" in assumed)
    pads = options(config.channel_pad, ChannelPad, "channel_pad" in assumed)
    is_bottleneck = config.architecture.stride is not None
    strides = options(config.stride, Stride, "stride" in assumed) if is_bottleneck else [None]
    found: list[tuple[Any, Any, Any]] = []
    for shortcut in shortcuts:
        try:
            with jax.enable_x64(True):
                read(shortcut=shortcut, channel_pad=None, stride=None)
        except WeightsError:  # its keys say that it is none of these
            continue
        found += itertools.product([shortcut], pads if shortcut is Shortcut.A else [None], strides)
    return found


def options(first: enum.Enum, kind: Iterable[enum.Enum], is_open: bool) -> list[Any]:
    """`first`, and the others of its kind if it is no more than assumed."""
    return [first, *(x for x in kind if x is not first)] if is_open else [first]
