"""A split whose images are cut out and given to the devices one by one, as they are needed."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from flax_resnet.data import images
from flax_resnet.data.examples import Examples
from flax_resnet.data.images import BadImageError
from flax_resnet.errors import DatasetError

Seen = TypeVar("Seen")


class Images(ABC):
    """Images by their number, with their classes.

    To be read by many threads at once, and, pickled, by other processes.
    """

    label: Int[np.ndarray, " n"]  # int32

    def __len__(self) -> int:
        return len(self.label)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """In RGB. Raises OSError, BadImageError or DatasetError if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where that image is, for a message."""

    def seen(self, index: int, view: Callable[[Image.Image], Seen]) -> Seen:
        """What `view` makes of an image. Raises DatasetError, with its name, if it cannot."""
        try:
            return view(self.image(index))
        except (OSError, BadImageError) as e:
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            raise DatasetError(
                f"{self.name(index)} cannot be read ({reason}): mend it, and the same command goes "
                "on; a new run can leave it out, with --config.data.allow_bad=1"
            ) from e


class Encoded(Images):
    """Images as bytes: JPEG, PNG and so on."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The file of an image. Raises OSError or BadImageError if it cannot be read."""

    @abstractmethod
    def stamp(self) -> object:
        """What `repr` shows to be another whenever the names, sizes or times of its files are."""

    def image(self, index: int) -> Image.Image:
        return images.decode(self.read(index))


class Arrays(Images):
    """Images that are in memory already, all of one size."""

    def __init__(self, examples: Examples, name: str):
        self.pixels: UInt8[np.ndarray, "n h w 3"] = examples.image
        self.label = examples.label
        self.of = name

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"image {index} of {self.of}"


class Part(Images):
    """Some images of a split, in an order of their own."""

    def __init__(self, whole: Images, indices: Sequence[int] | Int[np.ndarray, " n"]):
        self.whole = whole
        self.indices = np.asarray(indices)
        self.label = whole.label[self.indices]

    def image(self, index: int) -> Image.Image:
        return self.whole.image(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))


def spelled(path: str | os.PathLike[str]) -> str:
    """A path for a message, also one that is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
