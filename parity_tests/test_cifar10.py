"""CIFAR-10 is read to the bit or refused, with no TensorFlow, whatever is missing or damaged."""

import functools
import hashlib
import http.server
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from faults.small_cifar import (
    DAMAGES,
    NAMES,
    archive_path,
    cache_entry,
    dataset_path,
    flip,
    measured,
    shorten,
    start_process,
    train_shard,
    write_archive,
)
from flax_resnet.data import cache, cifar
from flax_resnet.data.cifar import CIFAR10
from flax_resnet.data.examples import Examples
from flax_resnet.errors import DatasetError
from parity_tests.data_sets import need_cifar10

ARCHIVE = Path(CIFAR10.url).name


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps each test off the network, and off the user's directories."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed_port = probe.getsockname()[1]
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{closed_port}/{ARCHIVE}")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "tfds"


@pytest.fixture
def archive(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Examples]:
    """Puts a small archive where a user would; returns what is in it."""
    return put_archive(root, monkeypatch, seed=0)


@pytest.fixture
def prepared(root: Path, archive: dict[str, Examples]) -> dict[str, Examples]:
    """Prepares the small archive; returns what is in it."""
    cifar.load(str(root))
    return archive


def put_archive(root: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> dict[str, Examples]:
    examples = write_archive(root, seed)
    for name, value in measured(root).items():
        monkeypatch.setattr(CIFAR10, name, value)
    return examples


def assert_same(ours: dict[str, Examples], theirs: dict[str, Examples]) -> None:
    assert ours.keys() == theirs.keys()
    for split in theirs:
        for a, b in zip(ours[split], theirs[split], strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cifar, "_decode", lambda builder, splits: splits and pytest.fail("decoded again")
    )


# Preparing.


def test_archive_reads_back_to_the_bit_in_its_order(root, archive):
    examples = cifar.load(str(root))
    assert_same(examples, archive)
    assert examples["train"].image.dtype == np.uint8
    assert examples["train"].label.dtype == np.int32
    assert "tensorflow" not in sys.modules


def test_stock_tfds_reads_what_was_prepared(root, prepared):
    builder = tfds.builder("cifar10", data_dir=root)
    assert str(builder.version) == cifar.VERSION
    assert builder.info.features["label"].names == NAMES
    for split, examples in prepared.items():
        source = builder.as_data_source(split=split)
        assert len(source) == len(examples.label)
        by_id = sorted(source, key=lambda example: example["id"])
        assert [e["id"].decode() for e in by_id] == [f"{split}_{i:05d}" for i in range(len(by_id))]
        np.testing.assert_array_equal(np.stack([e["image"] for e in by_id]), examples.image)
        np.testing.assert_array_equal([e["label"] for e in by_id], examples.label)


def test_default_directory_is_that_of_tfds(archive):
    assert_same(cifar.load(None), archive)  # TFDS_DATA_DIR


def test_remote_directory_is_refused():
    with pytest.raises(DatasetError, match="local path, got gs://bucket"):
        cifar.load("gs://bucket")


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_wrong_archive_of_the_user_is_refused_and_kept(root, archive, damage):
    path = archive_path(root)
    if damage == "flipped":
        flip(path, 100)
    else:
        path.write_bytes(path.read_bytes()[:-1])
    data = path.read_bytes()
    with pytest.raises(DatasetError) as refusal:
        cifar.load(str(root))
    message = str(refusal.value)
    for expected in (str(CIFAR10.num_bytes), CIFAR10.sha256, CIFAR10.url):
        assert expected in message
    for got in (str(len(data)), hashlib.sha256(data).hexdigest()):
        assert got in message
    assert path.read_bytes() == data
    assert not dataset_path(root).exists()


def test_without_network_the_error_comes_at_once_and_says_where_to_put_the_file(root):
    start = time.monotonic()
    with pytest.raises(DatasetError) as refusal:
        cifar.load(str(root))
    assert time.monotonic() - start < 5
    assert f"fetch {CIFAR10.url} and put it at {archive_path(root)}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of the file that ARCHIVE_URL gives, from a server on this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    directory = tmp_path / "served"
    directory.mkdir()
    handler = functools.partial(Handler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # a client that hangs up is part of the tests
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{ARCHIVE}"
        monkeypatch.setattr(CIFAR10, "url", url)
        yield directory / ARCHIVE
        server.shutdown()


def test_download_goes_where_tfds_looks_for_it(root, archive, served):
    archive_path(root).rename(served)
    assert_same(cifar.load(str(root)), archive)
    assert archive_path(root).read_bytes() == served.read_bytes()


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"?" + data[1:]])
def test_wrong_download_is_refused_and_removed(root, archive, served, change):
    served.write_bytes(change(archive_path(root).read_bytes()))
    archive_path(root).unlink()
    with pytest.raises(DatasetError, match=f"must have .* sha256 {CIFAR10.sha256}, got"):
        cifar.load(str(root))
    assert not list(archive_path(root).parent.iterdir())
    assert not dataset_path(root).exists()


def test_endless_download_does_not_fill_the_disk(root, archive, served, monkeypatch):
    served.write_bytes(bytes(8 << 20))
    archive_path(root).unlink()
    sizes = []
    check = cifar._check_archive
    monkeypatch.setattr(
        cifar, "_check_archive", lambda *args: (sizes.append(args[1].stat().st_size), check(*args))
    )
    with pytest.raises(DatasetError):
        cifar.load(str(root))
    assert sizes == [1 << 20]  # one piece


# Several processes, and killed ones.


def test_processes_that_start_at_once_prepare_and_decode_once(root, archive):
    processes = [start_process(root) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    data = b"".join(array.tobytes() for e in archive.values() for array in e)
    for process, (stdout, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
        assert stdout == hashlib.sha256(data).hexdigest() + "\n"  # TFDS prints nothing between
        assert "OpenCV" not in stderr
    # The first reads back what it prepared, and one of them decodes it for the cache.
    assert (root / "calls").read_text().split() == ["_fetch", "_decode", "_decode"]


def test_killed_preparation_leaves_nothing_that_is_read(root, archive):
    process = start_process(root, "killed")
    process.communicate("\n", timeout=60)
    assert process.returncode == -signal.SIGKILL
    incomplete = root / "downloads" / "cifar10.incomplete"
    assert incomplete.exists()
    assert not dataset_path(root).exists()
    # Had it come further, there would be a dataset that was never read back.
    (incomplete / "cifar10" / "3.0.2").mkdir()
    assert_same(cifar.load(str(root)), archive)  # nor is the lock it held an obstacle
    assert not incomplete.exists()


# A prepared dataset that is damaged: its decoded copy must not hide that.


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_dataset_is_prepared_again_from_the_archive(root, prepared, damage, caplog):
    shard = train_shard(root)
    damage(shard)
    left = {path.name: path.read_bytes() for path in dataset_path(root).iterdir()}
    assert_same(cifar.load(str(root)), prepared)
    (aside,) = (root / "downloads").glob("cifar10.damaged.*")
    assert f"prepared again, the damaged one is {aside}" in caplog.text
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == left
    assert_same(cifar.load(str(root)), prepared)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard_is_named_where_there_is_no_archive(root, prepared, damage):
    archive_path(root).unlink()
    shard = train_shard(root)
    damage(shard)
    with pytest.raises(DatasetError) as refusal:
        cifar.load(str(root))
    assert str(shard) in str(refusal.value)
    assert f"delete {'it' if damage is Path.unlink else dataset_path(root)}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", [Path.unlink, shorten])
def test_damaged_description_is_refused_where_there_is_no_archive(root, prepared, damage):
    archive_path(root).unlink()
    damage(dataset_path(root) / "dataset_info.json")
    with pytest.raises(DatasetError, match=f"cannot read {dataset_path(root)} .* delete it"):
        cifar.load(str(root))


# A directory that is not quite the one that was asked for.


@pytest.mark.parametrize(
    "inner", ["cifar10/3.0.2", "cifar10", "cifar10/3.0.2/.", "cifar10/../cifar10"]
)
def test_a_directory_too_deep_is_understood(root, prepared, inner, caplog):
    before = sorted(root.rglob("*"))
    with caplog.at_level(logging.INFO, "flax_resnet"):
        assert_same(cifar.load(f"{root}/{inner}"), prepared)
    (line,) = [r.getMessage() for r in caplog.records if r.name == cifar.__name__]
    assert line.endswith(f"reading {dataset_path(root)}")
    assert sorted(root.rglob("*")) == before


def test_a_directory_too_deep_may_be_the_current_one(root, prepared, monkeypatch):
    monkeypatch.chdir(dataset_path(root))
    assert_same(cifar.load("."), prepared)


def test_a_copy_of_the_inner_folder_alone_is_understood(root, prepared, tmp_path):
    dataset_path(root).rename(tmp_path / "images")
    assert_same(cifar.load(str(tmp_path / "images")), prepared)


@pytest.mark.parametrize("inner", ["cifar10/3.0.2", "cifar10"])
def test_what_a_directory_too_deep_lacks_is_prepared_where_it_belongs(root, archive, inner):
    (root / "cifar10" / "3.0.1").mkdir(parents=True)  # so that `cifar10` is TFDS's folder
    assert_same(cifar.load(f"{root}/{inner}"), archive)
    assert dataset_path(root).exists()
    assert not (root / inner / "downloads").exists()


def test_a_data_directory_of_that_name_is_no_directory_too_deep(tmp_path, served, monkeypatch):
    archive = put_archive(tmp_path, monkeypatch, seed=0)
    archive_path(tmp_path).rename(served)
    for _ in range(2):
        assert_same(cifar.load(str(tmp_path / "cifar10")), archive)
        assert dataset_path(tmp_path / "cifar10").exists()


def test_another_dataset_is_refused(root, prepared):
    path = dataset_path(root) / "dataset_info.json"
    path.write_text(path.read_text().replace('"cifar10"', '"cifar100"'))
    for shard in dataset_path(root).glob("cifar10-*"):
        shard.rename(shard.with_name(shard.name.replace("cifar10", "cifar100")))
    dataset_path(root).rename(root / "other")
    with pytest.raises(DatasetError, match="other must hold cifar10, got cifar100"):
        cifar.load(str(root / "other"))


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"must be a directory, got the file .*/file"):
        cifar.load(str(tmp_path / "file"))


def test_a_directory_that_may_not_be_written_is_named(root, monkeypatch):
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DatasetError, match=rf"cannot prepare CIFAR-10 in {root} .*Permission"):
        cifar.load(str(root))


# The cache.


def test_second_start_reads_the_cache(root, prepared, monkeypatch):
    forbid_decoding(monkeypatch)
    assert_same(cifar.load(str(root)), prepared)


@pytest.mark.parametrize("offset", [0, 31, 32, 100, -1, "empty", "half", "end"])
def test_damaged_cache_is_found_and_built_again(root, prepared, caplog, monkeypatch, offset):
    entry = cache_entry()
    good = entry.read_bytes()
    if isinstance(offset, int):
        flip(entry, offset)
    else:
        entry.write_bytes(good[: {"empty": 0, "half": len(good) // 2, "end": -1}[offset]])
    assert_same(cifar.load(str(root)), prepared)
    assert [record.getMessage() for record in caplog.records if record.name == cache.__name__] == [
        f"{entry} is damaged: removed, to be decoded again"
    ]
    assert entry.read_bytes() == good
    forbid_decoding(monkeypatch)
    assert_same(cifar.load(str(root)), prepared)


def test_the_test_split_alone_reads_no_training_image(root, archive):
    cifar.load(str(root))
    for path in (Path(os.environ["XDG_CACHE_HOME"]) / "flax-resnet").glob("*.npy"):
        path.unlink()
    (shard,) = dataset_path(root).glob("*-train.array_record-*")
    shard.write_bytes(bytes(shard.stat().st_size))
    found = cifar.load(str(root), ["test"])
    assert_same(found, {"test": archive["test"]})
    assert not list((Path(os.environ["XDG_CACHE_HOME"]) / "flax-resnet").glob("*-train.npy"))


def test_another_dataset_in_the_same_place_takes_the_cache_over(root, prepared, monkeypatch):
    old = cache_entry()
    dataset_path(root).rename(root / "elsewhere")
    other = put_archive(root, monkeypatch, seed=2)
    assert_same(cifar.load(str(root)), other)
    assert cache_entry() != old  # and the old one is gone


def test_unusable_cache_directory_is_only_a_warning(root, archive, caplog, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert_same(cifar.load(str(root)), archive)
    assert "going on without a cache" in caplog.text


def test_full_disk_is_only_a_warning(root, archive, caplog, monkeypatch, tmp_path):
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_same(cifar.load(str(root)), archive)
    assert "No space left on device" in caplog.text
    assert [path.suffix for path in (tmp_path / "cache" / "flax-resnet").iterdir()] == [".lock"]


# The real images.


SIZES = {  # of the whole of it, and of what lies in ../shared
    ("test",): [(10_000,), (9_886,)],
    ("train", "test"): [(50_000, 10_000), (49_483, 9_886)],
}


@pytest.fixture(scope="module")
def real() -> tuple[str, str]:
    """Where the real images are, and the cache that the other tests read them from."""
    return str(need_cifar10()), os.environ["XDG_CACHE_HOME"]


@pytest.mark.parametrize(
    "splits", [("test",), pytest.param(("train", "test"), marks=pytest.mark.slow)], ids="-".join
)
def test_real_images(splits, real, monkeypatch):
    directory, cache = real
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    examples = cifar.load(directory, splits)
    assert tuple(len(examples[split].label) for split in splits) in SIZES[splits]
    for image, label in examples.values():
        assert image.shape == (len(label), 32, 32, 3)
        assert label.shape == (len(label),)
        assert set(label) == set(range(10))
    forbid_decoding(monkeypatch)
    start = time.process_time()  # 0.3 s here; of the processor, as others may use the machine
    cached = cifar.load(directory, splits)
    assert time.process_time() - start < 2
    assert_same(cached, examples)
