"""What some tests need and the project does not hold: CIFAR-10, photographs, weights and curves.

Each is looked for where its environment variable says, then in `../shared`, beside the checkout.
Where it is not, the test is skipped, and the reason says how to get it. No test downloads anything.
"""

import os
from pathlib import Path

import pytest

from flax_resnet.data import cifar

SHARED = Path(__file__).resolve().parents[2] / "shared"
CHECKPOINTS = "FLAX_RESNET_TEST_CHECKPOINTS"
METRICS = "FLAX_RESNET_TEST_METRICS"
PHOTOS = "FLAX_RESNET_TEST_PHOTOS"
PREPARE = "python -c 'from flax_resnet.data import cifar; cifar.load(None)'"


def find(variable: str, in_shared: str, content: str) -> Path | None:
    """The first of the two places that holds `content`, a pattern."""
    places = [os.environ.get(variable), SHARED / in_shared]
    paths = [Path(place).expanduser() for place in places if place]
    return next((path for path in paths if any(path.glob(content))), None)


def find_cifar10() -> Path | None:
    """The directory of TFDS that holds CIFAR-10, prepared."""
    return find("TFDS_DATA_DIR", "tfds", f"cifar10/{cifar.VERSION}/dataset_info.json")


def need_cifar10() -> Path:
    path = find_cifar10()
    if path is None:
        pytest.skip(
            "no CIFAR-10: set TFDS_DATA_DIR to a directory, in which this prepares it (170 MB from "
            f"{cifar.CIFAR10.url}): {PREPARE}"
        )
    return path


def need_checkpoint(name: str, source: str) -> Path:
    """A published file of weights.

    Args:
        source: from where a user gets the file.
    """
    path = find(CHECKPOINTS, "checkpoints", name)
    if path is None:
        pytest.skip(f"no {name}: set {CHECKPOINTS} to a directory that holds it, from {source}")
    return path / name


def need_metrics() -> Path:
    """The curves of tanjeffreyz's 12 published runs."""
    path = find(METRICS, "reference/metrics", "CifarResNet-*/test_errors.npy")
    if path is None:
        pytest.skip(
            f"no metrics of tanjeffreyz: set {METRICS} to a directory that holds each "
            "models/NETWORK/DATE/TIME/ of github.com/tanjeffreyz/deep-residual-learning that has a "
            "test_errors.npy, as NETWORK-TIME/"
        )
    return path


def need_photos() -> Path:
    """A folder of photographs: {train,val}/CLASS/*.jpg."""
    path = find(PHOTOS, "photos", "val/*/*.jpg")
    if path is None:
        pytest.skip(
            f"no photographs: set {PHOTOS} to a directory with train/CLASS/*.jpg and "
            "val/CLASS/*.jpg, such as those of Azure-Samples/cognitive-services-sample-data-files"
        )
    return path
