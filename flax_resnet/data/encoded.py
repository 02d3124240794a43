"""A split whose images are still in their files: what is read one by one, as it is needed."""

from abc import ABC, abstractmethod

import numpy as np
from jaxtyping import Int


class Encoded(ABC):
    """Images as bytes (JPEG, PNG, ...) by their number, with their classes.

    To be read by many threads at once, and, pickled, by other processes.
    """

    label: Int[np.ndarray, " n"]  # int32

    def __len__(self) -> int:
        return len(self.label)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The file of an image. Raises OSError, or a DatasetError, if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where that image is, for a message."""
