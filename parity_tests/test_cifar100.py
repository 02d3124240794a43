"""Claim: CIFAR-100 is prepared and read as CIFAR-10 is, by its fine labels.

What can be missing or damaged is the same code for both, and tested with CIFAR-10.
"""

from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from faults.small_cifar import archive_path, dataset_path, measured, write_archive
from flax_resnet.config import ResNetConfig
from flax_resnet.data import cifar, source
from flax_resnet.data.cifar import CIFAR10, CIFAR100
from flax_resnet.data.examples import Examples
from flax_resnet.data_config import DataConfig, Dataset
from flax_resnet.errors import ConfigError, DatasetError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "tfds"


@pytest.fixture
def archive(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Examples]:
    """Puts a small archive where a user would; returns what is in it."""
    examples = write_archive(root, 0, CIFAR100)
    for name, value in measured(root, CIFAR100).items():
        monkeypatch.setattr(CIFAR100, name, value)
    return examples


def settings(root: Path) -> DataConfig:
    return DataConfig(name=Dataset.CIFAR100, dir=str(root))


def test_images_and_fine_labels_read_back_to_the_bit(root, archive):
    assert not source.is_here(settings(root))
    for _ in range(2):  # prepared, and from the cache
        found = source.load(settings(root))
        assert list(found) == ["train", "test"]
        for split, examples in found.items():
            assert np.array_equal(examples.image, archive[split].image)
            assert np.array_equal(examples.label, archive[split].label)
    assert max(archive["train"].label) > 10
    assert source.is_here(settings(root))
    assert not cifar.is_here(str(root))  # CIFAR-10


def test_stock_tfds_reads_what_was_prepared(root, archive):
    cifar.load(str(root), which=CIFAR100)
    builder = tfds.builder("cifar100", data_dir=root)
    assert Path(builder.data_dir) == dataset_path(root, CIFAR100)
    assert builder.info.features["label"].num_classes == 100
    assert builder.info.features["label"].names[99] == "class99"
    for split, examples in archive.items():
        by_id = sorted(builder.as_data_source(split=split), key=lambda example: example["id"])
        assert [e["id"].decode() for e in by_id] == [f"{split}_{i:05d}" for i in range(len(by_id))]
        np.testing.assert_array_equal(np.stack([e["image"] for e in by_id]), examples.image)
        np.testing.assert_array_equal([e["label"] for e in by_id], examples.label)
        np.testing.assert_array_equal([e["coarse_label"] for e in by_id], examples.label % 20)


def test_a_wrong_archive_is_named(root, archive):
    path = archive_path(root, CIFAR100)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DatasetError, match=rf"no CIFAR-100 archive .* fetch {CIFAR100.url} and"):
        source.load(settings(root))


def test_each_has_the_names_of_its_classes():
    assert source.class_names(settings(Path("nowhere"))) == CIFAR100.classes
    assert (len(CIFAR10.classes), len(CIFAR100.classes)) == (10, 100)
    for names in (CIFAR10.classes, CIFAR100.classes):
        assert len(set(names)) == len(names)
        assert list(names) == sorted(names)  # as both archives have them


def test_a_network_must_have_100_classes():
    config = settings(Path("nowhere"))
    with pytest.raises(ConfigError, match="must be 100, the classes of cifar100, got 10"):
        source.check_network(config, ResNetConfig())
    source.check_network(config, ResNetConfig(num_classes=100))
