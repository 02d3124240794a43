"""Claim: a run's last pictures show which classes were confused, and the worst mistakes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flax_resnet.training import pictures
from flax_resnet.training.predictions import Predictions

TRUE = [0, 0, 1, 1, 2, 2, -1, 1]
TAKEN = [0, 1, 1, 2, 0, 2, 0, -1]
LOSS = [0.1, 2.0, 0.2, 3.0, 2.5, 0.3, np.nan, np.nan]
NAMES = ["fork", "hemlock", "a class with a very long name"]


def found() -> Predictions:
    top = np.stack([TAKEN, np.zeros(8, int)], 1)
    probability = np.tile([0.75, 0.25], (8, 1))
    return Predictions(np.array(TRUE), top, probability, np.array(LOSS), 1, None)


def test_the_matrix_counts_true_classes_in_rows() -> None:
    """An image of an unknown class, or that could not be read, counts nowhere."""
    expected = [[1, 1, 0], [0, 1, 1], [1, 0, 1]]
    np.testing.assert_array_equal(pictures.confusion(found(), 3), expected)


def test_the_worst_mistakes_come_first() -> None:
    """A right answer is no mistake, however unsure."""
    np.testing.assert_array_equal(pictures.worst(found()), [3, 4, 1])


def test_names_keep_their_ends() -> None:
    shown = [pictures.shortened(name) for name in NAMES]
    assert shown == ["fork", "hemlock", "a class wi…ng name"]


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 100, 101])
def test_the_pictures_can_be_drawn(tmp_path: Path, classes: int) -> None:
    names = [f"class {i}" for i in range(classes)]
    images = found()._replace(label=np.minimum(TRUE, 1), top=np.minimum(found().top, 1))
    pictures.plot_confusion(images, names, tmp_path / "confusion.png", "title")
    assert Image.open(tmp_path / "confusion.png").size > (300, 300)
    shown: list[int] = []

    def image(index: int) -> np.ndarray:
        shown.append(index)
        return np.zeros((32, 32, 3), np.uint8)

    pictures.plot_mistakes(images, names, image, tmp_path / "mistakes.png", "title")
    assert Image.open(tmp_path / "mistakes.png").size > (300, 300)
    assert shown == pictures.worst(images).tolist()
