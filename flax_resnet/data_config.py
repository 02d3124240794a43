"""Which images an experiment has, and what becomes of them before the network sees them."""

import enum
import os
from dataclasses import dataclass
from typing import NamedTuple

from flax_resnet import places
from flax_resnet.settings import Settings, require, require_float32


class Dataset(enum.Enum):
    CIFAR10 = "cifar10"  # 32x32 colour photographs in 10 classes
    CIFAR100 = "cifar100"  # likewise, in 100 classes
    DIGITS = "digits"  # scikit-learn's 8x8 handwritten digits, enlarged to 32x32x3
    FOLDER = "folder"  # of the user's own images: dir/train/CLASS/ and dir/val/CLASS/
    TFDS = "tfds"  # any image classification of tensorflow-datasets, by data.tfds


class Preprocess(enum.Enum):
    """How pixels become numbers."""

    MEAN_IMAGE = "mean_image"  # 0..255, less the training set's mean image: the paper
    OWN_MEAN = "own_mean"  # 0..1, less each image's own mean of each channel: tanjeffreyz
    IMAGENET = "imagenet"  # 0..1, standardised by ImageNet's channel mean and deviation: akamaster
    STANDARDIZE = "standardize"  # 0..1, standardised by the training set's own
    CONSTANTS = "constants"  # 0..1, standardised by data.mean and data.std


class Interpolation(enum.Enum):
    """How PIL makes a photograph smaller."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class Crop(enum.Enum):
    """Which part of an image a training step sees."""

    PAD = "pad"  # of the image as it is evaluated, after data.pad zeros around it: CIFAR's
    RANDOM_RESIZED = "random_resized"  # a random part of its area, resized: Inception's
    SCALE_JITTER = "scale_jitter"  # a random square after a random resize: the paper's ImageNet
    CENTRE = "centre"  # the same as in evaluation


class Placement(enum.Enum):
    """Where the images of a split are while a run needs them."""

    RESIDENT = "resident"  # all on the devices
    STREAMED = "streamed"  # on the disk, decoded as they are needed


class View(NamedTuple):
    """How an image is cut out of its file, with the defaults of its data set filled in."""

    resize: int | None  # of the short side, in pixels; None: the image as it is
    crop: int | None  # side of the square in the middle, in pixels; None: the image as it is
    train_crop: Crop


SIDE = 32  # of CIFAR's and the digits' images, in pixels
OF_32_PIXELS = (Dataset.CIFAR10, Dataset.CIFAR100, Dataset.DIGITS)
USUAL_SIZES = 256, 224  # a photograph's resize and crop (paper, section 3.4)
LARGEST_SIDE = 4096  # to which an image is resized or cropped


@dataclass
class DataConfig(Settings, group="data"):
    """Which images, and what becomes of them before the network sees them."""

    name: Dataset = Dataset.CIFAR10
    # of tensorflow-datasets (else $TFDS_DATA_DIR, else its own default), or the user's folder
    dir: str | None = None
    tfds: str | None = None  # NAME[/CONFIG][:VERSION] of a prepared set, for data.name=tfds
    preprocess: Preprocess = Preprocess.MEAN_IMAGE
    mean: tuple[float, ...] = ()  # of each channel, 0 to 1, for data.preprocess=constants
    std: tuple[float, ...] = ()  # likewise
    # of the short side; None: 256 for photographs, CIFAR's and the digits' images as they are
    resize: int | None = None
    crop: int | None = None  # side of the square in the middle; None: 224, or as they are
    interpolation: Interpolation = Interpolation.BILINEAR
    train_crop: Crop | None = None  # None: random_resized for photographs, pad for 32x32 images
    pad: int = 4  # zeros around a training image before the random crop; 0: no crop
    area: tuple[float, ...] = (0.08, 1.0)  # least and largest part of it, for random_resized
    jitter: tuple[int, ...] = (256, 480)  # least and largest short side, for scale_jitter
    flip: bool = True
    colour: float = 0.0  # deviation of AlexNet's random shift of colours; the paper's ImageNet: 0.1
    # mixup: each image is blended with another, in a share drawn from Beta(mixup, mixup); 0: never
    mixup: float = 0.0
    # CutMix: a box of each image comes from another, of a size drawn from Beta(cutmix, cutmix);
    # 0: never; with mixup: a coin says for each batch which of the two
    cutmix: float = 0.0
    validation: int = 0  # training examples held out; the paper's 45k/5k split: 5000
    allow_bad: int = 0  # how many unreadable images to leave out; more end the run before it begins
    placement: Placement | None = None  # None: resident if a split is small enough
    threads: int | None = None  # that decode streamed images; None: one for each core
    workers: int = 0  # processes that do so in the place of threads; for more than some ten cores

    @property
    def view(self) -> View:
        """What `resize`, `crop` and `train_crop` come to for this data set."""
        is_small = self.name in OF_32_PIXELS
        resize, crop = (None, None) if is_small else USUAL_SIZES
        usual = Crop.PAD if is_small else Crop.RANDOM_RESIZED
        return View(self.resize or resize, self.crop or crop, self.train_crop or usual)

    @property
    def side(self) -> int:
        """Of the images that a network is given, in pixels."""
        return self.view.crop or self.view.resize or SIDE

    @property
    def padding(self) -> int:
        """Zeros around a training image on the device."""
        return self.pad if self.view.train_crop is Crop.PAD else 0

    @property
    def num_threads(self) -> int:
        """How many threads decode in each process."""
        return self.threads or os.cpu_count() or 1

    def validate(self) -> None:
        """Raises ConfigError for numbers out of range, and a `dir` that is not on this machine."""
        require_float32(self)
        require(self.dir != "", "data.dir", "a directory, or none for the default", self.dir)
        if self.dir is not None:
            places.local_path(self.dir, "data.dir")
        self.validate_constants()
        self.validate_view()
        require(self.validation >= 0, "data.validation", "0 or more examples", self.validation)
        for name, alpha in {"data.mixup": self.mixup, "data.cutmix": self.cutmix}.items():
            require(alpha == 0 or 1e-3 <= alpha <= 1e3, name, "0, or 0.001 to 1000", alpha)
        require(self.allow_bad >= 0, "data.allow_bad", "0 or more images", self.allow_bad)
        threads = self.threads
        require(threads is None or 1 <= threads <= 1024, "data.threads", "1 to 1024", threads)
        require(0 <= self.workers <= 1024, "data.workers", "0 to 1024", self.workers)

    def require_given(self) -> None:
        """Raises ConfigError unless it says which images, where the data set's name does not."""
        rule = "the directory with train/CLASS/ and val/CLASS/ inside, with data.name=folder"
        require(self.name is not Dataset.FOLDER or self.dir is not None, "data.dir", rule, self.dir)
        rule = "such as imagenette/320px-v2:1.0.0 with data.name=tfds"
        require(self.name is not Dataset.TFDS or bool(self.tfds), "data.tfds", rule, self.tfds)

    def validate_constants(self) -> None:
        needs_them = self.preprocess is Preprocess.CONSTANTS
        for name, numbers in {"data.mean": self.mean, "data.std": self.std}.items():
            rule = "three numbers, of red, green and blue"
            holds = len(numbers) == 3 or (not numbers and not needs_them)
            require(holds, name, rule + " with data.preprocess=constants" * needs_them, numbers)
        rule = "0 to 1, as pixels are before it is subtracted"
        require(all(0 <= x <= 1 for x in self.mean), "data.mean", rule, self.mean)
        require(all(x > 0 for x in self.std), "data.std", "above 0", self.std)

    def validate_view(self) -> None:
        rule = f"1 to {LARGEST_SIDE} pixels"
        for name in ("resize", "crop"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= LARGEST_SIDE, f"data.{name}", rule, value)
        require(0 <= self.pad <= 32, "data.pad", "0 to 32 pixels", self.pad)
        resize, crop, train_crop = self.view
        if resize is not None and crop is None:
            require(False, "data.crop", "given where data.resize is", self.crop)
        cuts = train_crop in (Crop.RANDOM_RESIZED, Crop.SCALE_JITTER)
        rule = "given, the side of what is cut out, with this data.train_crop"
        require(not cuts or crop is not None, "data.crop", rule, self.crop)
        rule = "two numbers above 0, at most 1, the first not above the second"
        is_range = len(self.area) == 2 and 0 < self.area[0] <= self.area[1] <= 1
        require(is_range, "data.area", rule, self.area)
        rule = f"two sides of 1 to {LARGEST_SIDE} pixels, the first not above the second"
        is_range = len(self.jitter) == 2 and 1 <= self.jitter[0] <= self.jitter[1] <= LARGEST_SIDE
        require(is_range, "data.jitter", rule, self.jitter)
        if train_crop is Crop.SCALE_JITTER and crop is not None:
            rule = f"at least data.crop ({crop}) in its first side"
            require(self.jitter[0] >= crop, "data.jitter", rule, self.jitter)
        require(0 <= self.colour <= 10, "data.colour", "0 to 10", self.colour)

    def idle(self) -> dict[str, str]:
        """By path, the settings that change nothing beside the others, and why."""
        found: dict[str, str] = {}
        if self.name is Dataset.DIGITS and self.dir is not None:
            found["data.dir"] = "the digits come with scikit-learn"
        if self.name is not Dataset.TFDS:
            found["data.tfds"] = "data.name is not tfds"
        if self.preprocess is not Preprocess.CONSTANTS:
            why = "data.preprocess is not constants"
            found |= dict.fromkeys(("data.mean", "data.std"), why)
        if self.preprocess is Preprocess.OWN_MEAN:
            found["data.colour"] = "data.preprocess=own_mean takes the mean colour away"
        train_crop = self.view.train_crop
        of_crop = {
            "data.pad": Crop.PAD,
            "data.area": Crop.RANDOM_RESIZED,
            "data.jitter": Crop.SCALE_JITTER,
        }
        for name, crop in of_crop.items():
            if train_crop is not crop:
                found[name] = f"data.train_crop is {train_crop.value}"
        if self.view.resize is None and train_crop is not Crop.RANDOM_RESIZED:
            found["data.interpolation"] = "no image is resized"
        if self.workers:
            found["data.threads"] = "data.workers decode"
        if self.placement is Placement.RESIDENT:
            found |= dict.fromkeys(("data.threads", "data.workers"), "data.placement is resident")
        return found


# Settings that decide how images come to the devices, and nothing of what they are.
INCIDENTAL = ("data.allow_bad", "data.dir", "data.placement", "data.threads", "data.workers")
