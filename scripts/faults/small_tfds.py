"""A small set of JPEG files, prepared as tensorflow-datasets does, with no TensorFlow."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

NAMES = ("cat", "dog", "eel")
SIZES = {"train": 12, "test": 4, "validation": 5}
Files = dict[str, list[tuple[bytes, int]]]  # by split, each image's file and label


class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Photographs of different sizes, under names of features that are not the usual ones."""

    VERSION = tfds.core.Version("1.2.0")
    name = "small"

    def __init__(self, files: Files, **kwargs: Any) -> None:
        self.files = files
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "photo": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "kind": tfds.features.ClassLabel(names=list(NAMES)),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self.files}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, (content, label) in enumerate(self.files[split]):
            example = {"photo": io.BytesIO(content), "kind": label, "file_name": f"{split}{i}.jpg"}
            yield i, example


def write(
    root: Path, *, test_has_labels: bool = True, labels: Mapping[int, int] | None = None
) -> Files:
    """Prepares it in `root`; returns what is in it.

    Args:
        labels: other ones of some training images.
    """
    rng = np.random.default_rng(0)
    files: Files = {}
    for split, size in SIZES.items():
        own = [i % len(NAMES) for i in range(size)]
        if split == "test" and not test_has_labels:
            own = [-1] * size
        files[split] = [(photo(rng), label) for label in own]
    for i, label in (labels or {}).items():
        files["train"][i] = files["train"][i][0], label
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints where it is
        Small(files, data_dir=root).download_and_prepare(file_format="array_record")
    return files


def photo(rng: np.random.Generator) -> bytes:
    """A JPEG file of some 10 KB."""
    height, width = rng.integers(40, 90, 2)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=95)
    return content.getvalue()


def directory(root: Path) -> Path:
    return root / "small" / "1.2.0"


def shard(root: Path, split: str = "train") -> Path:
    """The only one."""
    (path,) = directory(root).glob(f"small-{split}.array_record-*")
    return path


def damage_record(shard: Path, content: bytes) -> None:
    """Flips a bit in the middle of the record that holds that file.

    The shard is compressed, but what JPEG has compressed lies there as it is.
    """
    data = bytearray(shard.read_bytes())
    data[data.index(content[-2000:-1980])] ^= 1
    shard.write_bytes(data)


def copy_as(directory: Path, version: str) -> None:
    """Puts the same files beside it, as another version."""
    copy = directory.with_name(version)
    shutil.copytree(directory, copy)
    path = copy / "dataset_info.json"
    path.write_text(path.read_text().replace(directory.name, version))


def rewrite_info(root: Path, **changes: Any) -> None:
    """Has the set's description say something else."""
    path = directory(root) / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
