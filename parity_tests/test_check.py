"""Claim: an image that cannot be read is named before the first step, or left out if that is let.

And what is merely odd is read. The folders are made by scripts/faults/bad_images.py.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from faults import bad_images, small_tfds
from faults.bad_images import CLASSES, PER_CLASS
from flax_resnet.data import check, folder, records, source
from flax_resnet.data.encoded import Encoded
from flax_resnet.data_config import DataConfig, Dataset, Placement
from flax_resnet.errors import DatasetError

SIZE = len(CLASSES) * PER_CLASS  # images of a split


def settings(root: Path, allow_bad: int = 0) -> DataConfig:
    where = {"name": Dataset.FOLDER, "dir": str(root), "placement": Placement.STREAMED}
    return DataConfig(**where, allow_bad=allow_bad, threads=2)


def spoil(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_bytes(b"")


def refusal(config: DataConfig) -> str:
    with pytest.raises(DatasetError) as refused:
        source.load(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def names(split: source.Split) -> list[str]:
    assert not isinstance(split, tuple)
    return [split.name(i) for i in range(len(split))]


@pytest.mark.parametrize("damage", bad_images.BAD, ids=lambda damage: damage.__name__)
def test_a_bad_image_is_named_with_its_reason_or_left_out(
    root: Path, damage: bad_images.Maker, caplog: pytest.LogCaptureFixture
) -> None:
    if damage is bad_images.no_permission and os.geteuid() == 0:
        pytest.skip("the tests run as root, who may read everything")
    before = names(source.load(settings(root))["train"])
    path = root / "train/green/2.jpg"
    damage(path, random.Random(0))
    message = refusal(settings(root))
    assert message.startswith(f"1 of {2 * SIZE} images cannot be read: {path} (")
    assert f"{path} ({bad_images.BAD[damage]}" in message
    assert message.endswith("leave them out with --config.data.allow_bad=1")
    train = source.load(settings(root, allow_bad=1))["train"]
    assert names(train) == [name for name in before if name != str(path)]
    assert all(f"/{CLASSES[train.label[i]]}/" in name for i, name in enumerate(names(train)))
    assert f"train: 1 of {SIZE} images are left out: {path} (" in caplog.text


@pytest.mark.parametrize("change", bad_images.ODD, ids=lambda change: change.__name__)
def test_an_odd_image_is_read(root: Path, change: bad_images.Maker) -> None:
    change(root / "train/green/2.jpg", random.Random(0))
    train = source.load(settings(root))["train"]
    assert len(names(train)) == SIZE
    assert all(f"/{CLASSES[train.label[i]]}/" in name for i, name in enumerate(names(train)))


def test_more_than_are_allowed_are_listed_up_to_ten(root: Path) -> None:
    bad = [f"{split}/red/{i}.jpg" for split in bad_images.SPLITS for i in range(4)]
    bad += [f"train/blue/{i}.jpg" for i in range(4)]
    spoil(root, *bad)
    message = refusal(settings(root, allow_bad=11))
    assert message.startswith(f"12 of {2 * SIZE} images cannot be read: ")
    assert message.count(" (empty)") == 10
    assert " and 2 more; " in message
    assert message.endswith("--config.data.allow_bad=12")


def test_only_what_is_asked_for_is_looked_at(root: Path) -> None:
    spoil(root, "train/red/0.jpg")
    assert len(names(source.load(settings(root), ["test"])["test"])) == SIZE
    refusal(settings(root))


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were decoded, each time that some are."""
    sizes: list[int] = []
    look = check.look
    monkeypatch.setattr(
        check,
        "look",
        lambda split, indices, *rest: sizes.append(len(indices)) or look(split, indices, *rest),
    )
    return sizes


def add_time(root: Path) -> None:
    """A file is written again with the same bytes."""
    stat = (root / "train/red/1.jpg").stat()
    os.utime(root / "train/red/1.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def mend(root: Path) -> None:
    bad_images.save(root / "train/red/0.jpg", bad_images.picture("red", random.Random(0)))


def rename(root: Path) -> None:
    (root / "train/red/1.jpg").rename(root / "train/red/9.jpg")


@pytest.mark.parametrize("change", [add_time, mend, rename])
def test_each_image_is_looked_at_once_until_a_file_changes(
    root: Path, looked: list[int], change: Callable[[Path], None]
) -> None:
    spoil(root, "train/red/0.jpg")
    first = refusal(settings(root))
    assert looked == [SIZE, SIZE]
    assert refusal(settings(root)) == first
    assert len(names(source.load(settings(root, 1))["train"])) == SIZE - 1
    assert looked == [SIZE, SIZE]
    change(root)
    assert len(names(source.load(settings(root, 1))["train"])) == SIZE - (change is not mend)
    assert looked == [SIZE, SIZE, SIZE]


def test_a_damaged_memory_is_not_believed(root: Path, looked: list[int], tmp_path: Path) -> None:
    spoil(root, "train/red/0.jpg")
    first = refusal(settings(root))
    for entry in (tmp_path / "cache/flax-resnet").glob("checked-*.npy"):
        content = bytearray(entry.read_bytes())
        content[-1] ^= 1
        entry.write_bytes(content)
    assert refusal(settings(root)) == first
    assert looked == [SIZE] * 4


@pytest.mark.parametrize("limit", ["MOST_IMAGES", "MOST_BYTES"])
def test_of_a_large_split_a_sample_is_looked_at(
    root: Path, looked: list[int], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(check, limit, SIZE // 2 if limit == "MOST_IMAGES" else 9_000)
    monkeypatch.setattr(check, "SAMPLE", 4)
    spoil(root, "train/blue/1.jpg")  # not in the sample
    source.load(settings(root))
    assert looked == [4, 4]
    spoil(root, "train/blue/0.jpg")
    message = refusal(settings(root))
    assert message.startswith(f"1 of 8 looked at, of {2 * SIZE}, images cannot be read: ")
    assert message.endswith("find the others with scripts/check_data.py")
    # Who lets some be left out must wait until all have been seen.
    assert len(names(source.load(settings(root, 2))["train"])) == SIZE - 2
    assert looked == [4] * 4 + [SIZE] * 2
    assert refusal(settings(root)).startswith(f"2 of {2 * SIZE} images cannot be read: ")
    assert len(looked) == 6


def test_of_large_photographs_the_sample_is_smaller(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = folder.load(settings(root))["train"]
    assert check.is_small(split)
    monkeypatch.setattr(check, "MOST_BYTES", check.mean_bytes(split) * 3)
    assert not check.is_small(split)
    assert len(check.sample(split)) == 4


def test_a_damaged_record_and_one_without_a_label_are_bad(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = small_tfds.write(tmp_path / "tfds", labels={3: -1})
    shard = small_tfds.shard(tmp_path / "tfds")
    small_tfds.damage_record(shard, files["train"][5][0])
    config = DataConfig(name=Dataset.TFDS, tfds="small", dir=str(tmp_path / "tfds"))
    train = records.load(config)["train"]
    bad = check.find(train, 2, "train", everything=True).bad
    assert sorted(bad.values()) == ["damaged record", "no label"]
    config.allow_bad = 2
    kept = source.load(config)["train"]
    assert len(kept.label) == len(train) - 2
    assert min(kept.label) == 0
    with pytest.raises(DatasetError, match=rf"{shard.name}, record \d+ \(damaged record\)"):
        check.check(DataConfig(), {"train": train})
    # Of a large split, too, where nobody comes across them.
    monkeypatch.setattr(check, "SAMPLE", 1)
    assert check.sample(train) == sorted({0, *np.flatnonzero(train.label < 0)})


def test_of_a_large_folder_the_folders_are_asked_for_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stamp() -> str:
        split: Encoded = folder.load(settings(root))["train"]
        return repr(split.stamp())

    monkeypatch.setattr(folder, "MOST_ASKED", SIZE - 1)
    first = stamp()
    add_time(root)
    assert stamp() == first
    rename(root)
    assert stamp() != first
    monkeypatch.setattr(folder, "MOST_ASKED", SIZE)
    (root / "train/red/3.jpg").unlink()
    (root / "train/red/3.jpg").symlink_to("nowhere")
    stamp()  # nor is a link to nowhere an obstacle
