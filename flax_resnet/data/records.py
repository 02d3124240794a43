"""Any image classification that tensorflow-datasets has prepared, read with no TensorFlow.

The images stay what they are, JPEG or PNG files inside TFDS's `array_record` shards, and are read
one by one. Only the labels are read at once; as each lies beside its image, that reads the whole
split, once: they are kept in the cache.
"""

import json
import logging
import os
import re
import resource
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from filelock import FileLock
from tqdm import tqdm

from flax_resnet import places
from flax_resnet.data import cache, prepared
from flax_resnet.data.encoded import Encoded
from flax_resnet.data.images import BadImageError
from flax_resnet.data_config import DataConfig
from flax_resnet.errors import DatasetError

NO_LABEL = -1  # of a record that has none or cannot be read
ORDERED_BY_ID = ("cifar10", "cifar100")  # as in their archives
EVALUATED = ("test", "validation")  # TFDS's splits; the first that there is, with labels, is "test"
AT_ONCE = 256  # records read together for their labels

_CACHE_FORMAT = 1  # to be raised with every change to the layout of a cache entry
_REQUEST = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")

_log = logging.getLogger(__name__)


class Keys(NamedTuple):
    """Under which names a record has its image and its class."""

    image: str
    label: str


class Prepared(NamedTuple):
    """A data set of TFDS that is on this machine."""

    directory: Path
    builder: Any  # tfds.core.DatasetBuilder
    keys: Keys
    class_names: tuple[str, ...]


class Records(Encoded):
    """A split of a prepared set: in the order of its shards, CIFAR's by their ids."""

    def __init__(self, files: list[Path], counts: list[int], features: Any, key: str) -> None:
        """Args: the shards, how many records each has, TFDS's features, and the image's name."""
        self.files = files
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.features = features
        self.key = key
        # With its range a shard is opened only when one of its records is asked for.
        self.source = ArrayRecordDataSource(
            [f"{path}[0:{count}]" for path, count in zip(files, counts, strict=True)]
        )
        self.label = np.full(self.starts[-1], NO_LABEL, np.int32)
        self.order = np.arange(self.starts[-1])
        allow_open_files(len(files))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        allow_open_files(len(self.files))

    def read(self, index: int) -> bytes:
        try:
            return undecoded(self.features, self.source[self.order[index]])[self.key]
        except Exception as error:  # Neither array_record nor TFDS says what it raises.
            raise BadImageError("damaged record") from error

    def name(self, index: int) -> str:
        record = self.order[index]
        shard = np.searchsorted(self.starts, record, "right") - 1
        return f"{self.files[shard]}, record {record - self.starts[shard]}"

    def stamp(self) -> object:
        return self.key, cache.stamp(self.files)


def load(config: DataConfig, splits: Collection[str] = ("train", "test")) -> dict[str, Records]:
    """Those of "train" and "test" that are asked for and that there are.

    "test" is TFDS's split of that name or, where there is none with labels, as of imagenet2012 and
    imagenette, "validation".

    A record that is damaged has NO_LABEL, and to read it is an error: `check` leaves it out.

    Raises:
        DatasetError: the set is not prepared on this machine, is no image classification, or is
            in a format that needs TensorFlow; or one of its shards is missing or damaged as a
            whole.
    """
    found = _open(config)
    names = {"train": "train", "test": _evaluated(found)}
    there = found.builder.info.splits
    chosen = {ours: theirs for ours, theirs in names.items() if theirs in there and ours in splits}
    return {ours: _labelled(found, theirs) for ours, theirs in chosen.items()}


def class_names(config: DataConfig) -> tuple[str, ...]:
    """Of the set that `config.tfds` names, in the order of the labels. Raises as `load` does."""
    return _open(config).class_names


def is_here(config: DataConfig) -> bool:
    """Whether the set is prepared; raises DatasetError where `config.tfds` is no name of one."""
    return _find(config) is not None


def undecoded(features: Any, record: bytes) -> dict[str, Any]:
    """The features of a record, as they are written there."""
    decoders = {name: tfds.decode.SkipDecoding() for name in features}
    return features.deserialize_example_np(record, decoders=decoders)


def allow_open_files(count: int) -> None:
    """Every shard that was read from stays open: ImageNet's are as many as a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * count + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _open(config: DataConfig) -> Prepared:
    request = _request(config)
    directory = _find(config)
    if directory is None:
        raise DatasetError(_not_prepared(config, request))
    try:
        told = json.loads((directory / "dataset_info.json").read_text(encoding="utf-8"))
        kind = told.get("fileFormat") or _guessed_format(directory)
        builder = None
        if kind == "array_record":
            builder = tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS does not say what it raises on damaged files.
        raise DatasetError(
            f"cannot read {directory} ({prepared.reason(error)}): prepare it anew, "
            + _how_to_prepare(request, directory)
        ) from error
    if builder is None:
        raise DatasetError(
            f"{directory} must be in array_record, which needs no TensorFlow, got {kind}: where "
            "TensorFlow is, convert it with python -m tensorflow_datasets.scripts.convert_format "
            f"--dataset_version_dir={directory} --out_file_format=array_record --out_dir=OTHER, "
            "and put that in its place"
        )
    keys = _keys(directory, builder.info)
    features: Any = builder.info.features
    names = features[keys.label].names
    return Prepared(directory, builder, keys, tuple(names))


def _request(config: DataConfig) -> dict[str, str | None]:
    """The name, configuration and version that `config.tfds` asks for."""
    match = _REQUEST.fullmatch(config.tfds or "")
    if match is None:
        raise DatasetError(
            "data.tfds must be NAME[/CONFIG][:VERSION] such as imagenette/320px-v2:1.0.0, got "
            f"{config.tfds}"
        )
    return match.groupdict()


def _find(config: DataConfig) -> Path | None:
    """The folder of the set's files, in the data directory or, if that lies too deep, above.

    Without a version the newest that there is.
    """
    request, given = _request(config), prepared.directory(config.dir)
    inner = Path(*filter(None, (request["name"], request["config"])))
    absolute = Path(os.path.abspath(given))
    for root in (given, *absolute.parents[:3]):
        versions = _versions(root / inner)
        wanted = request["version"]
        if versions and (wanted is None or wanted in versions):
            if root != given:
                _log.info("%s is within tensorflow-datasets' directory: reading %s", given, root)
            return root / inner / (wanted or versions[-1])
    return None


def _versions(folder: Path) -> list[str]:
    """Of a prepared set, from the oldest to the newest."""
    found = [path.parent.name for path in folder.glob("*/dataset_info.json")]
    found = [name for name in found if _VERSION.fullmatch(name)]
    return sorted(found, key=lambda name: [int(part) for part in name.split(".")])


def _not_prepared(config: DataConfig, request: dict[str, str | None]) -> str:
    """What to do; with it what there is of that name instead."""
    root = prepared.directory(config.dir)
    folder = root / str(request["name"])
    found = [(path.parent.relative_to(root)) for path in folder.glob("**/dataset_info.json")]
    others = sorted(f"{path.parent}:{path.name}" for path in found if _VERSION.fullmatch(path.name))
    there = f"there are {', '.join(others)}" if others else f"data.dir is {root}"
    told = f"{config.tfds} is not prepared ({there}): "
    return f"{told}{'take one of these, or ' if others else ''}{_how_to_prepare(request, root)}"


def _how_to_prepare(request: dict[str, str | None], root: Path) -> str:
    name = "/".join(filter(None, (request["name"], request["config"])))
    return (
        f"where TensorFlow is, tfds build {name} --file_format=array_record --data_dir=DIR; then "
        "have that DIR here and give it as --config.data.dir"
    )


def _guessed_format(directory: Path) -> str:
    """By the names of the shards: what TFDS wrote long ago does not tell."""
    is_tfrecord = any(directory.glob("*.tfrecord-*"))
    return "tfrecord" if is_tfrecord else "array_record"


def _keys(directory: Path, info: Any) -> Keys:
    """The one image and the one class of each record; those that are for training, if several."""
    kinds = tfds.features
    images = [name for name, x in info.features.items() if type(x) is kinds.Image]
    labels = [name for name, x in info.features.items() if type(x) is kinds.ClassLabel]
    supervised = info.supervised_keys or ()
    if len(supervised) == 2 and supervised[0] in images and supervised[1] in labels:
        return Keys(*supervised)
    if len(images) == 1 and len(labels) == 1:
        return Keys(images[0], labels[0])
    there = ", ".join(f"{name} ({type(x).__name__})" for name, x in info.features.items())
    raise DatasetError(
        f"{directory} must have one image and one class in each record, got {there}: data.tfds "
        "must name a set of images with classes"
    )


def _evaluated(found: Prepared) -> str:
    """Which of TFDS's splits "test" is; the first record tells whether one has labels."""
    there = [name for name in EVALUATED if name in found.builder.info.splits]
    for name in there:
        files, counts = _shards(found, name)
        if sum(counts):
            first = next(i for i, count in enumerate(counts) if count)
            label, _ = next(_scan_shard(files[first], counts[first], found))
            if label != NO_LABEL:
                return name
    return ""


def _shards(found: Prepared, split: str) -> tuple[list[Path], list[int]]:
    info = found.builder.info.splits[split]
    return [Path(path) for path in info.filepaths], list(info.shard_lengths)


def _labelled(found: Prepared, split: str) -> Records:
    """The split with its labels, from the cache or read."""
    files, counts = _shards(found, split)
    records = Records(files, counts, found.builder.info.features, found.keys.image)
    try:
        stamp = cache.stamp(files)
    except OSError as error:
        raise DatasetError(
            f"{found.directory} lacks a shard ({prepared.reason(error)}): copy it again"
        ) from error
    folder = places.cache_directory()
    stem = f"labels-{cache.sha256(os.fspath(found.directory.resolve()))[:16]}-{split}"
    made_from = cache.sha256(repr((_CACHE_FORMAT, found.keys, counts, stamp)))
    entry = folder / f"{stem}-{made_from[:16]}.npy"
    scanned = None
    try:
        scanned = cache.read(entry, "read")
        if scanned is None:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{stem}.lock"):
                scanned = cache.read(entry, "read")  # another process may have written it
                if scanned is None:
                    scanned = _scan(found, split)
                    for old in folder.glob(f"{stem}-*"):
                        old.unlink()
                    cache.write(entry, scanned)
    except OSError as error:
        _log.warning("going on without a cache of labels: %s", error)
    records.label, records.order = scanned or _scan(found, split)
    return records


def _scan(found: Prepared, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads all records; returns the labels, int32 (n,), and the numbers of their records."""
    files, counts = _shards(found, split)
    name = f"{found.builder.info.name}, labels of {split}"
    with tqdm(total=sum(counts), unit=" records", desc=name, disable=None) as progress:
        scanned = []
        for path, count in zip(files, counts, strict=True):
            for one in _scan_shard(path, count, found):
                scanned.append(one)
                progress.update()
    label = np.array([label for label, _ in scanned], np.int32)
    order = np.arange(len(label))
    if found.builder.info.name in ORDERED_BY_ID:
        order = np.argsort(np.array([identity for _, identity in scanned]), kind="stable")
    return label[order], order


def _scan_shard(path: Path, count: int, found: Prepared) -> Iterator[tuple[int, bytes]]:
    """The label and, if there is one, the id of each record."""
    features, key = found.builder.info.features, found.keys.label
    try:
        source = ArrayRecordDataSource([os.fspath(path)])
        if len(source) != count:
            raise ValueError(f"{len(source)} records instead of {count}")
    except Exception as error:  # array_record does not say what it raises.
        raise DatasetError(
            f"{path} is damaged ({prepared.reason(error)}): copy it again, or prepare the set anew"
        ) from error
    with source:
        for start in range(0, count, AT_ONCE):
            for record in _read(source, range(start, min(start + AT_ONCE, count))):
                try:
                    example = undecoded(features, record or b"")
                    label = int(example[key])
                except Exception:  # TFDS does not say what it raises; `check` tells.
                    yield NO_LABEL, b""
                    continue
                is_class = 0 <= label < len(found.class_names)
                yield label if is_class else NO_LABEL, example.get("id", b"")


def _read(source: ArrayRecordDataSource, numbers: range) -> list[bytes | None]:
    """Those records; None for one that is damaged."""
    try:
        return list(source.__getitems__(numbers))
    except Exception:  # array_record does not say what it raises, nor in which record.
        return [_read_one(source, number) for number in numbers]


def _read_one(source: ArrayRecordDataSource, number: int) -> bytes | None:
    try:
        return source[number]
    except Exception:
        return None
