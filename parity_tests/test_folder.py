"""Claim: a folder of images by class is what it says: classes, splits and files, or a clear error.

Torchvision's ImageFolder finds the same images and classes where it finds any.
"""

import os
import shutil
from pathlib import Path

import pytest

from faults import bad_images
from flax_resnet.data import folder, source
from flax_resnet.data_config import DataConfig, Dataset
from flax_resnet.errors import ConfigError, DatasetError


def settings(root: Path, **more: object) -> DataConfig:
    return DataConfig(name=Dataset.FOLDER, dir=str(root), resize=24, crop=20, **more)


def names(split: object) -> list[str]:
    assert isinstance(split, folder.Folder)
    return [split.name(i) for i in range(len(split))]


def test_images_and_classes_are_those_of_torchvision(root: Path) -> None:
    pytest.importorskip("torch", reason="the other side is torchvision")
    from parity_tests import others

    datasets = others.torchvision("datasets")
    (root / "train/green/more").mkdir()
    (root / "train/green/0.jpg").rename(root / "train/green/more/10.JPEG")
    (root / "train/green/notes.txt").write_text("no image")
    found = folder.load(settings(root))
    for ours, theirs in (("train", "train"), ("test", "val")):
        other = datasets.ImageFolder(str(root / theirs))
        assert set(zip(names(found[ours]), found[ours].label.tolist(), strict=True)) == set(
            other.samples
        )
        assert list(folder.class_names(settings(root))) == other.classes


def test_a_class_that_one_split_lacks_is_an_error(root: Path) -> None:
    """ImageFolder would give every class after it another number."""
    first, *_ = folder.class_names(settings(root))
    (root / "val" / first).rename(root / "val" / "zebra")
    message = f"same classes in every split, got only in train: {first}; only in val: zebra"
    with pytest.raises(DatasetError, match=message):
        folder.load(settings(root))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: root.rename(root.parent / "gone"), "got what is not there"),
        (lambda root: [x.unlink() for x in (root / "train/green").iterdir()], "green must hold im"),
        (lambda root: (root / "validation").mkdir(), "one validation split, got val and validat"),
    ],
)
def test_what_is_no_folder_of_classes_is_refused(root: Path, harm: object, message: str) -> None:
    assert callable(harm)
    harm(root)
    with pytest.raises(DatasetError, match=message):
        folder.load(settings(root))


def test_a_folder_without_folders_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="must hold a folder of images for each class, got none"):
        folder.load(settings(tmp_path))


def test_a_class_must_have_a_name_that_can_be_written_down(root: Path) -> None:
    for split in (b"train", b"val"):
        os.mkdir(os.fsencode(root) + b"/" + split + b"/caf\xe9")
    with pytest.raises(DatasetError, match=r"name in UTF-8, got the folder .*caf\\xe9; rename it"):
        folder.load(settings(root))


def test_a_file_may_have_a_name_that_is_no_utf8(root: Path) -> None:
    path = os.fsencode(root) + b"/train/green/"
    os.rename(path + b"0.jpg", path + b"caf\xe9.jpg")
    found = folder.load(settings(root))["train"]
    (odd,) = [i for i, name in enumerate(names(found)) if "caf" in name]
    assert names(found)[odd].endswith(r"caf\xe9.jpg")
    assert found.image(odd).size


def test_links_count_as_what_they_lead_to(root: Path) -> None:
    outside = root.parent / "outside.jpg"
    (root / "train/green/0.jpg").rename(outside)
    (root / "train/green/0.jpg").symlink_to(outside)
    (root / "train/blue").rename(root.parent / "blue")
    (root / "train/blue").symlink_to(root.parent / "blue")
    (root / "train/green/loop").symlink_to(root / "train")
    (root / "train/green/.hidden.jpg").write_bytes(b"")
    assert len(folder.load(settings(root))["train"]) == len(bad_images.CLASSES) * (
        bad_images.PER_CLASS
    )


def test_one_split_is_divided_evenly_over_the_classes(root: Path) -> None:
    classes, each = len(bad_images.CLASSES), bad_images.PER_CLASS
    alone = settings(root / "train", validation=classes, train_crop="centre")
    found = source.load(alone)
    assert set(found["test"].label.tolist()) == set(range(classes))
    assert len(found["train"].label) == classes * (each - 1)
    with pytest.raises(ConfigError, match="nothing to test on: hold some out"):
        source.load(settings(root / "train"))
    assert len(source.load(settings(root / "train"), ("test",))["test"].label) == classes * each


def test_a_test_folder_makes_the_other_one_decide_which_checkpoint_is_best(root: Path) -> None:
    (root / "val").rename(root / "validation")
    assert set(folder.load(settings(root))) == {"train", "test"}
    shutil.copytree(root / "validation", root / "test")
    assert set(folder.load(settings(root))) == {"train", "test", "validation"}
    with pytest.raises(ConfigError, match="validation must be 0 where there is a folder of valid"):
        source.load(settings(root, validation=1))
