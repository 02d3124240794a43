"""Claim: a TFRecord copy of CIFAR-10 gives the bits of the array_record one, or names its damage.

TFRecord is what TFDS writes unless told otherwise. The small copies are written by tensorboardX,
whose files of events are TFRecords; it computes the checksums byte by byte, we all at once.
"""

import json
import os
import shutil
import struct
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorboardX.record_writer import RecordWriter, masked_crc32c

from faults.small_cifar import dataset_path, flip, measured, write_archive
from flax_resnet.data import cifar, tfrecord
from flax_resnet.data.cifar import CIFAR10
from flax_resnet.data.examples import Examples
from flax_resnet.errors import DatasetError
from parity_tests.data_sets import need_cifar10

Splits = dict[str, Examples]


def records_of(shard: Path) -> list[bytes]:
    source = ArrayRecordDataSource([os.fspath(shard)])
    return source.__getitems__(range(len(source)))


def write(path: Path, records: list[bytes]) -> None:
    writer = RecordWriter(str(path))
    for record in records:
        writer.write(record)
    writer.close()


def write_at_once(path: Path, records: list[bytes]) -> None:
    """The same for many records: with our own checksums, which a test below compares."""
    lengths = [struct.pack("<Q", len(record)) for record in records]
    sums = zip(tfrecord.checksums(lengths), tfrecord.checksums(records), strict=True)
    with path.open("wb") as file:
        for length, record, (a, b) in zip(lengths, records, sums, strict=True):
            file.write(length + struct.pack("<I", a) + record + struct.pack("<I", b))


def copy_as_tfrecord(dataset: Path, root: Path, write=write) -> Path:
    """Another data directory with the same dataset."""
    copy = dataset_path(root)
    copy.mkdir(parents=True)
    for path in sorted(dataset.iterdir()):
        target = copy / path.name.replace("array_record", "tfrecord")
        if target.name == path.name:
            target.write_text(path.read_text().replace("array_record", "tfrecord"))
        else:
            write(target, records_of(path))
    return copy


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Splits]:
    """A prepared dataset of 48 random images, and what is in it."""
    root = tmp_path_factory.mktemp("small")
    examples = write_archive(root, seed=0)
    with (
        mock.patch.dict(os.environ, XDG_CACHE_HOME=str(root / "cache")),
        mock.patch.multiple(CIFAR10, **measured(root)),
    ):
        cifar.load(str(root))
    return dataset_path(root), examples


@pytest.fixture
def copy(
    small: tuple[Path, Splits], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Splits]:
    """A data directory with a TFRecord copy, and what is in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy_as_tfrecord(small[0], tmp_path / "tfds")
    return tmp_path / "tfds", small[1]


def shard_of(root: Path) -> Path:
    return dataset_path(root) / "cifar10-train.tfrecord-00000-of-00001"


def assert_same(ours: Splits, theirs: Splits) -> None:
    assert ours.keys() == theirs.keys()
    for split in theirs:
        for a, b in zip(ours[split], theirs[split], strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)


def test_a_copy_gives_the_same_bits_without_tensorflow(copy: tuple[Path, Splits]) -> None:
    root, examples = copy
    assert_same(cifar.load(str(root)), examples)
    assert "tensorflow" not in sys.modules


def test_an_old_description_need_not_name_the_format(copy: tuple[Path, Splits]) -> None:
    root, examples = copy
    path = dataset_path(root) / "dataset_info.json"
    info = json.loads(path.read_text())
    del info["fileFormat"]
    path.write_text(json.dumps(info))
    assert_same(cifar.load(str(root)), examples)


def test_checksums_are_crc32c() -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.bytes(n) for n in (0, 1, 300, 2, 0, 300, 17)] + [b"123456789"]
    ours = tfrecord.checksums(blocks)
    assert ours.tolist() == [masked_crc32c(block) for block in blocks]
    # The value in every table of CRCs, masked.
    crc = 0xE3069283
    assert ours[-1] == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
    assert tfrecord.checksums([]).tolist() == []


SECOND = 12 + 2000 + 4  # where the second of the records below begins
DAMAGES = {
    "its length": (SECOND, "another checksum"),
    "its length, by far": (SECOND + 7, "claims to be"),
    "its length's checksum": (SECOND + 8, "another checksum"),
    "a byte of it": (SECOND + 12 + 1234, "another checksum"),
    "its checksum": (SECOND + 12 + 2000, "another checksum"),
}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    write(tmp_path / "three", [rng.bytes(2000) for _ in range(3)])
    return tmp_path / "three"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_flipped_bit_names_the_record(three: Path, damage: str) -> None:
    offset, complaint = DAMAGES[damage]
    assert len(tfrecord.read(three)) == 3
    flip(three, offset)
    with pytest.raises(ValueError, match=f"^record 1 .*{complaint}"):
        tfrecord.read(three)


@pytest.mark.parametrize("kept", [1, 11, 12, 500, 2012, 2015])
def test_a_record_that_was_cut_short_is_named(three: Path, kept: int) -> None:
    three.write_bytes(three.read_bytes()[: SECOND + kept])
    with pytest.raises(ValueError, match=r"^record 1 is cut short"):
        tfrecord.read(three)


def flip_image(shard: Path) -> None:
    flip(shard, shard.read_bytes().index(b"IDAT"))


def lose_last(shard: Path) -> None:
    write(shard, tfrecord.read(shard)[:-1])


def hold_rubbish(shard: Path) -> None:
    write(shard, [b"rubbish"] * len(tfrecord.read(shard)))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (flip_image, "record 0 has another checksum than its bytes"),
        (lose_last, "39 records instead of 40"),
        (hold_rubbish, "DecodeError"),
        (Path.unlink, "No such file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_shard_is_named(copy: tuple[Path, Splits], damage, complaint: str) -> None:
    shard = shard_of(copy[0])
    damage(shard)
    with pytest.raises(DatasetError) as refusal:
        cifar.load(str(copy[0]))
    message = str(refusal.value)
    assert str(shard) in message
    assert complaint in message
    assert "\n" not in message


def test_a_format_that_needs_tensorflow_is_refused(copy: tuple[Path, Splits]) -> None:
    dataset = dataset_path(copy[0])
    path = dataset / "dataset_info.json"
    path.write_text(path.read_text().replace("tfrecord", "riegeli"))
    for shard in dataset.glob("*tfrecord*"):
        shard.rename(shard.with_name(shard.name.replace("tfrecord", "riegeli")))
    with pytest.raises(DatasetError, match=r"or tfrecord, .*riegeli.* delete it"):
        cifar.load(str(copy[0]))


@pytest.mark.slow
def test_the_real_images_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = need_cifar10()
    expected = cifar.load(str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = copy_as_tfrecord(dataset_path(directory), tmp_path, write_at_once)
    assert not list(copy.glob("*array_record*"))
    assert_same(cifar.load(str(tmp_path)), expected)
    shutil.rmtree(copy)  # 140 MB
