"""CIFAR-10 and CIFAR-100 through tensorflow-datasets, prepared and read with no TensorFlow.

TFDS reads `array_record` files without TensorFlow, but needs it to prepare CIFAR. The builder
here replaces the two steps that do (unpacking the archive, encoding PNG) and writes what TFDS
would have written: stock `tfds.builder("cifar10", data_dir=...)` reads it. A copy that TFDS itself
has prepared is in `tfrecord` files, its default, which are read too.

Nothing is believed unseen: the archive has a known digest, each record its checksum, the decoded
copy in the cache a digest of ours.
"""

import contextlib
import hashlib
import http.client
import io
import json
import logging
import os
import re
import shutil
import tarfile
import time
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from flax_resnet import places
from flax_resnet.data import cache, prepared, tfrecord
from flax_resnet.data.examples import Examples
from flax_resnet.errors import DatasetError

VERSION = "3.0.2"  # TFDS's, of both


@dataclass
class Cifar:
    """One of the two: its archive, and how a record of it begins."""

    name: str  # TFDS's
    title: str
    url: str
    num_bytes: int  # of the archive
    sha256: str
    folder: str  # in the archive
    splits: dict[str, list[str]]  # the files of each, in order
    names: dict[str, str]  # by label, in the order of its bytes: the file with its classes
    builder: type[tfds.core.GeneratorBasedBuilder]  # TFDS's, which has the features
    words: str  # what its classes are called, in the order of "label"

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.words.split())


CIFAR10 = Cifar(
    "cifar10",
    "CIFAR-10",
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-10-batches-bin",
    {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
    {"label": "batches.meta.txt"},
    tfds.image_classification.Cifar10,
    "airplane automobile bird cat deer dog frog horse ship truck",
)
CIFAR100 = Cifar(
    "cifar100",
    "CIFAR-100",
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    168_513_733,
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    "cifar-100-binary",
    {"train": ["train.bin"], "test": ["test.bin"]},
    {"coarse_label": "coarse_label_names.txt", "label": "fine_label_names.txt"},
    tfds.image_classification.Cifar100,
    """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
        butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach
        couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster
        house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
        motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
        pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket
        rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
        sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
        turtle wardrobe whale willow_tree wolf woman worm
    """,
)

_TIMEOUT_SECONDS = 10  # to connect, and between two pieces of the download
_CACHE_FORMAT = 2  # to be raised with every change to the layout of a cache entry

_log = logging.getLogger(__name__)


def load(
    data_dir: str | None = None,
    splits: Collection[str] = ("train", "test"),
    which: Cifar = CIFAR10,
) -> dict[str, Examples]:
    """Returns CIFAR, first downloaded and prepared if `data_dir` does not hold it.

    Args:
      data_dir: TFDS's data directory, the one with `cifar10/3.0.2` inside, or one of these two
        folders. By default TFDS's own choice: TFDS_DATA_DIR of the environment, else
        ~/tensorflow_datasets.
      splits: which are wanted; the others are not read.

    Returns:
      The Examples of each split, sorted by TFDS's `id`: the same order whatever the sharding. A
      decoded copy is kept in `flax-resnet` under XDG_CACHE_HOME, by default ~/.cache.

    Raises:
      DatasetError: the dataset is not there and cannot be had, or is damaged and the archive it
        was prepared from is not in `data_dir/downloads/manual`. Where that is, the dataset is
        prepared again, and the damaged one kept beside the archive.
    """
    given = prepared.directory(data_dir)
    dataset = _find(which, given)
    root = dataset.parents[1]
    if root != given:
        _log.info("%s is within tensorflow-datasets' directory: reading %s", given, dataset)
    if not dataset.exists():
        _prepare(which, root, dataset)
    try:
        return _load(which, dataset, splits)
    except _DamagedError as error:
        if not _archive(which, root).exists():
            raise
        _prepare(which, root, dataset, error)
        return _load(which, dataset, splits)


def is_here(data_dir: str | None = None, which: Cifar = CIFAR10) -> bool:
    """Whether `load` finds it prepared, without a download; raises DatasetError for no path."""
    return _find(which, prepared.directory(data_dir)).exists()


def _find(which: Cifar, given: Path) -> Path:
    """The dataset's own folder, in the data directory `given` or, if `given` lies too deep, above.

    It need not be there. A copy of that folder under other names is found as well.
    """
    dataset = given / which.name / VERSION
    if dataset.exists() or _archive(which, given).exists():
        return dataset
    absolute = Path(os.path.abspath(given))
    if absolute.parts[-2:] == (which.name, VERSION) or (given / "dataset_info.json").exists():
        return absolute
    versions = [path for path in given.glob("*.*.*") if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    if (given / VERSION).exists() or (absolute.name == which.name and versions):
        return absolute / VERSION
    return dataset


class _DamagedError(DatasetError):
    """What was prepared is not whole."""


def _load(which: Cifar, dataset: Path, splits: Collection[str]) -> dict[str, Examples]:
    """Reads what is prepared, or the decoded copy of it in the cache: a file for each split."""
    builder, fingerprint = _open(which, dataset)
    folder = places.cache_directory()
    stem = f"{which.name}-{cache.sha256(os.fspath(dataset.resolve()))[:16]}"
    entries = {split: folder / f"{stem}-{fingerprint[:16]}-{split}.npy" for split in splits}
    found: dict[str, Examples] = {}
    try:
        found = _read_entries(entries)
        if len(found) < len(entries):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{stem}.lock"):
                found = _read_entries(entries)  # another process may have written them meanwhile
                missing = [split for split in splits if split not in found]
                if missing:
                    found |= _decode(builder, missing)
                    for old in set(folder.glob(f"{stem}-*")) - set(
                        folder.glob(f"{stem}-{fingerprint[:16]}-*")
                    ):
                        old.unlink()
                    for split in missing:
                        cache.write(entries[split], found[split])
    except OSError as error:
        _log.warning("going on without a cache of decoded images: %s", error)
    if missing := [split for split in splits if split not in found]:
        found |= _decode(builder, missing)
    return {split: found[split] for split in splits}


def _builder(which: Cifar, data_dir: Path) -> Any:
    """TFDS's own builder (name, version, features, ids), made to do without TensorFlow."""

    class Builder(which.builder, skip_registration=True):
        name = which.name
        MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {which.url} there."

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            archive = Path(dl_manager.manual_dir) / Path(which.url).name
            features: Any = self.info.features
            for label, file in which.names.items():
                features[label].names = _read_member(which, archive, file).decode().split()
            return {split: _read_split(which, archive, split) for split in which.splits}

    made: Any = Builder
    return made(data_dir=data_dir)


def _read_split(which: Cifar, archive: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    data = b"".join(_read_member(which, archive, file) for file in which.splits[split])
    labels = list(which.names)
    # A record is its labels, then the image, one channel after the other.
    records = np.frombuffer(data, np.uint8).reshape(-1, len(labels) + 3 * 32 * 32)
    for index, record in enumerate(records):
        pixels = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
        # A PIL image, because TFDS encodes an array with TensorFlow.
        example = {"image": Image.fromarray(np.ascontiguousarray(pixels))}
        example |= {label: int(record[i]) for i, label in enumerate(labels)}
        yield index, {"id": f"{split}_{index:05d}", **example}


def _read_member(which: Cifar, archive: Path, name: str) -> bytes:
    """Reads one file of the archive by its exact name; nothing is unpacked onto the disk."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"{which.folder}/{name}")
        if file is None:
            raise ValueError(f"{name} is not a file in {archive}")
        return file.read()


def _archive(which: Cifar, root: Path) -> Path:
    """`manual` is where TFDS, too, looks for what was downloaded by hand."""
    return root / "downloads" / "manual" / Path(which.url).name


def _prepare(which: Cifar, root: Path, dataset: Path, damage: _DamagedError | None = None) -> None:
    """Makes `dataset`, all or nothing, and once however many processes ask for it.

    Args:
      damage: what is wrong with the one that is there, which is then moved aside.
    """
    archive = _archive(which, root)
    # A fixed name: the next attempt clears away what a killed one has left.
    incomplete = root / "downloads" / f"{which.name}.incomplete"
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "downloads" / f"{which.name}.lock"):
            if dataset.exists() and (damage is None or _is_whole(which, dataset)):
                return
            _fetch(which, archive)
            shutil.rmtree(incomplete, ignore_errors=True)
            builder = _builder(which, incomplete)
            config = tfds.download.DownloadConfig(manual_dir=archive.parent)
            # TFDS prints to stdout that it does not know the size, and a path soon gone.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_config=config, file_format="array_record")
            made = Path(builder.data_dir)
            _decode(_open(which, made)[0])  # Published only once every record has been read back.
            dataset.parent.mkdir(exist_ok=True)
            if dataset.exists():
                aside = root / "downloads" / f"{which.name}.damaged.{time.time_ns()}"
                dataset.rename(aside)
                _log.warning("%s; prepared again, the damaged one is %s", damage, aside)
            made.rename(dataset)
            shutil.rmtree(incomplete)
    except DatasetError:
        raise
    except Exception as error:  # TFDS and array_record do not say what they raise.
        raise DatasetError(
            f"cannot prepare {which.title} in {root} ({prepared.reason(error)}): mend that, or give"
            " another data directory"
        ) from error


def _fetch(which: Cifar, archive: Path) -> None:
    """Checks `archive`, or downloads it: under its name only once it has the right digest."""
    partial = archive.with_name(archive.name + ".partial")
    try:
        if archive.exists():
            _check_archive(which, archive)
            return
        with (
            urllib.request.urlopen(which.url, timeout=_TIMEOUT_SECONDS) as response,
            partial.open("wb") as file,
            tqdm(total=which.num_bytes, unit="B", unit_scale=True, desc=archive.name) as progress,
        ):
            # One that is too long will be refused: it need not fill the disk first.
            while file.tell() <= which.num_bytes and (piece := response.read(1 << 20)):
                file.write(piece)
                progress.update(len(piece))
        _check_archive(which, partial)
        partial.replace(archive)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DatasetError(
            f"no {which.title} archive ({prepared.reason(error)}): fetch {which.url} and put it at "
            f"{archive}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_archive(which: Cifar, path: Path) -> None:
    with path.open("rb") as file:
        size, sha256 = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    if (size, sha256) != (which.num_bytes, which.sha256):
        raise ValueError(
            f"{path} must have {which.num_bytes} bytes and sha256 {which.sha256}, got {size} bytes"
            f" and sha256 {sha256}"
        )


def _open(which: Cifar, dataset: Path) -> tuple[tfds.core.DatasetBuilder, str]:
    """Opens a prepared dataset; the string changes when the dataset does."""
    try:
        builder = tfds.builder_from_directory(dataset, file_format=_format(dataset))
        shards = [
            Path(path) for split in which.splits for path in builder.info.splits[split].filepaths
        ]
        stats = cache.stamp(shards)
        info = (dataset / "dataset_info.json").read_text(encoding="utf-8")
    except Exception as error:  # TFDS does not say what it raises on damaged files.
        # One in another format is none of ours to replace.
        kind = DatasetError if _is_of_another_format(dataset) else _DamagedError
        raise kind(
            f"cannot read {dataset} as array_record or tfrecord, which need no TensorFlow"
            f" ({prepared.reason(error)}): delete it to have it prepared anew, or give another data"
            " directory"
        ) from error
    if builder.info.name != which.name:
        raise DatasetError(f"{dataset} must hold {which.name}, got {builder.info.name}")
    return builder, cache.sha256(repr((_CACHE_FORMAT, info, stats)))


def _format(dataset: Path) -> str | None:
    """To be asked for; None for a TFRecord copy, whose description may be too old to name it."""
    is_tfrecord = any(dataset.glob("*.tfrecord-*")) and not any(dataset.glob("*.array_record-*"))
    return None if is_tfrecord else "array_record"


def _is_of_another_format(dataset: Path) -> bool:
    try:
        info = json.loads((dataset / "dataset_info.json").read_text(encoding="utf-8"))
        return info.get("fileFormat", "array_record") not in ("array_record", "tfrecord")
    except (OSError, ValueError, AttributeError):
        return False


def _is_whole(which: Cifar, dataset: Path) -> bool:
    try:
        _decode(_open(which, dataset)[0])
    except _DamagedError:
        return False
    return True


def _decode(
    builder: tfds.core.DatasetBuilder, splits: Collection[str] = ("train", "test")
) -> dict[str, Examples]:
    """Reads and decodes all records, about 10,000 a second."""
    return {split: _decode_split(builder, split) for split in splits}


def _decode_split(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
    info = builder.info.splits[split]
    image = np.empty((info.num_examples, 32, 32, 3), np.uint8)
    label = np.empty(info.num_examples, np.int32)
    ids: list[bytes] = []
    # PNG is decoded here: TFDS does the same with PIL, but warns that OpenCV would be faster.
    decoders = {"image": tfds.decode.SkipDecoding()}
    features: Any = builder.info.features
    for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
        try:  # A shard at a time, so that the error can name it.
            records = _read_records(Path(path))
            if len(records) != length:
                raise ValueError(f"{len(records)} records instead of {length}")
            for record in records:
                example = features.deserialize_example_np(record, decoders=decoders)
                image[len(ids)] = np.asarray(Image.open(io.BytesIO(example["image"])))
                label[len(ids)] = example["label"]
                ids.append(example["id"])
        except Exception as error:  # Neither array_record nor PIL nor TFDS says what it raises.
            raise _DamagedError(
                f"{path} is damaged ({prepared.reason(error)}): delete {builder.data_dir} to have"
                " it prepared anew"
            ) from error
    order = np.argsort(np.array(ids))
    return Examples(image[order], label[order])


def _read_records(shard: Path) -> Sequence[bytes]:
    if ".tfrecord-" in shard.name:
        return tfrecord.read(shard)
    source = ArrayRecordDataSource([os.fspath(shard)])
    # One that was cut short opens as one of 0 records, of which none may be asked for.
    return source.__getitems__(range(len(source))) if len(source) else []


def _read_entries(entries: dict[str, Path]) -> dict[str, Examples]:
    """The splits that the cache has."""
    read = {split: cache.read(entry) for split, entry in entries.items()}
    return {split: Examples(*arrays) for split, arrays in read.items() if arrays is not None}
