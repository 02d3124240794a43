"""Claim: what TFDS has prepared is read as its own files' bytes with their labels, or refused.

The small set is one of JPEG files that the tests prepare, with no TensorFlow.
"""

import io
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faults import small_tfds
from flax_resnet.data import cifar, records
from flax_resnet.data.images import BadImageError
from flax_resnet.data.records import NO_LABEL, Records
from flax_resnet.data_config import DataConfig, Dataset
from flax_resnet.errors import DatasetError
from parity_tests.data_sets import need_cifar10

TRAIN = small_tfds.SIZES["train"]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


@pytest.fixture(scope="module")
def real() -> Path:
    return need_cifar10()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tfds"


def settings(root: Path | None, tfds: str = "small") -> DataConfig:
    return DataConfig(name=Dataset.TFDS, tfds=tfds, dir=None if root is None else str(root))


def contents(split: Records) -> list[tuple[bytes, int]]:
    return [(split.read(i), int(split.label[i])) for i in range(len(split))]


def refusal(config: DataConfig) -> str:
    with pytest.raises(DatasetError) as refused:
        records.load(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_files_come_back_to_the_bit_with_their_labels(root: Path) -> None:
    files = small_tfds.write(root)
    found = records.load(settings(root))
    assert list(found) == ["train", "test"]
    for split in found:
        assert sorted(contents(found[split])) == sorted(files[split])
        assert found[split].label.dtype == np.int32
    assert records.class_names(settings(root)) == small_tfds.NAMES
    assert list(records.load(settings(root), ["test"])) == ["test"]
    assert "tensorflow" not in sys.modules


def test_threads_and_other_processes_read_the_same(root: Path) -> None:
    small_tfds.write(root)
    train = records.load(settings(root))["train"]
    expected = contents(train)
    copy = pickle.loads(pickle.dumps(train))
    assert contents(copy) == expected
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(copy.read, [*range(TRAIN)] * 20))
    assert read == [content for content, _ in expected] * 20


def test_where_the_test_split_has_no_labels_the_validation_split_is_evaluated(root: Path) -> None:
    files = small_tfds.write(root, test_has_labels=False)
    test = records.load(settings(root))["test"]
    assert sorted(contents(test)) == sorted(files["validation"])


@pytest.mark.parametrize("inner", ["", "small", "small/1.2.0"])
def test_the_directory_may_be_the_environments_or_too_deep(
    root: Path, monkeypatch: pytest.MonkeyPatch, inner: str
) -> None:
    small_tfds.write(root)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root / inner))
    assert len(records.load(settings(None))["train"]) == TRAIN
    assert records.is_here(settings(None))


def test_without_a_version_the_newest_is_read(root: Path) -> None:
    small_tfds.write(root)
    here = small_tfds.directory(root)
    for version in ("1.10.0", "1.9.0"):
        small_tfds.copy_as(here, version)
    split = records.load(settings(root))["train"]
    assert f"{root}/small/1.10.0/" in split.name(0)
    split = records.load(settings(root, "small:1.2.0"))["train"]
    assert f"{root}/small/1.2.0/" in split.name(0)


@pytest.mark.parametrize(
    ("tfds", "parts"),
    [
        ("small:3.0.0", ["there are small:1.2.0", "tfds build small --file_format=array_record"]),
        ("small/big", ["there are small:1.2.0", "tfds build small/big --file_format="]),
        ("other", ["data.dir is", "where TensorFlow is, tfds build other --file_format="]),
        ("../small", ["NAME[/CONFIG][:VERSION]", "got ../small"]),
    ],
)
def test_what_is_not_there_is_told_with_what_is(root: Path, tfds: str, parts: list[str]) -> None:
    small_tfds.write(root)
    message = refusal(settings(root, tfds))
    for part in parts:
        assert part in message


def test_a_format_that_needs_tensorflow_is_refused(root: Path) -> None:
    small_tfds.write(root)
    small_tfds.rewrite_info(root, fileFormat="tfrecord")
    message = refusal(settings(root))
    assert "must be in array_record, which needs no TensorFlow, got tfrecord" in message
    assert f"--dataset_version_dir={small_tfds.directory(root)} " in message


def test_a_set_without_classes_is_refused(root: Path) -> None:
    small_tfds.write(root)
    path = small_tfds.directory(root) / "features.json"
    text = path.read_text()
    text = text.replace("class_label_feature.ClassLabel", "text_feature.Text")
    path.write_text(text.replace('"classLabel"', '"text"').replace('"numClasses": "3"', ""))
    message = refusal(settings(root))
    assert "one image and one class in each record, got " in message
    assert "photo (Image)" in message


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def hold_fewer(shard: Path) -> None:
    """It is another split's."""
    shard.write_bytes(small_tfds.shard(shard.parents[2], "test").read_bytes())


@pytest.mark.parametrize("damage", [Path.unlink, cut, hold_fewer])
def test_a_damaged_shard_is_named(root: Path, damage: Callable[[Path], object]) -> None:
    small_tfds.write(root)
    shard = small_tfds.shard(root)
    damage(shard)
    assert str(shard) in refusal(settings(root))


def test_a_damaged_record_has_no_label_and_is_named_when_read(root: Path) -> None:
    files = small_tfds.write(root)
    whole = contents(records.load(settings(root))["train"])
    shard = small_tfds.shard(root)
    small_tfds.damage_record(shard, files["train"][5][0])
    train = records.load(settings(root))["train"]
    (bad,) = np.flatnonzero(train.label == NO_LABEL)
    assert whole[bad] == files["train"][5]
    with pytest.raises(BadImageError, match="damaged record"):
        train.read(int(bad))
    assert train.name(int(bad)) == f"{shard}, record {bad}"
    good = [i for i in range(TRAIN) if i != bad]
    assert [(train.read(i), train.label[i]) for i in good] == [whole[i] for i in good]


def test_a_label_of_no_class_is_none(root: Path) -> None:
    files = small_tfds.write(root)
    directory = small_tfds.directory(root)
    (directory / "kind.labels.txt").write_text("cat\ndog\n")
    path = directory / "features.json"
    path.write_text(path.read_text().replace('"numClasses": "3"', '"numClasses": "2"'))
    train = records.load(settings(root))["train"]
    labels = [min(label, 5 - 3 * label) for _, label in files["train"]]  # eel, 2: -1
    assert sorted(train.label) == sorted(labels)


def test_labels_are_read_once_for_the_same_shards(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tfds.write(root)
    first = records.load(settings(root))
    scanned: list[str] = []
    scan = records._scan
    monkeypatch.setattr(
        records, "_scan", lambda found, split: scanned.append(split) or scan(found, split)
    )
    second = records.load(settings(root))
    assert scanned == []
    assert all(np.array_equal(first[split].label, second[split].label) for split in first)
    small_tfds.shard(root).touch()
    records.load(settings(root))
    assert scanned == ["train"]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar10_is_in_the_order_of_its_archive(split: str, real: Path) -> None:
    theirs = cifar.load(str(real), [split])[split]
    ours = records.load(settings(real, f"cifar10:{cifar.VERSION}"), [split])[split]
    assert np.array_equal(ours.label, theirs.label)
    for i in range(0, len(ours), 97):
        image = Image.open(io.BytesIO(ours.read(i)))
        assert np.array_equal(np.asarray(image), theirs.image[i])
